"""A detached shadow: the small network that `ShadowConfig` trains next to a model, as a separate model.

    small = veneer.unload_shadow(model)     # shares its modules with `model`
    small.generate(**batch)
    veneer.unload_shadow(model, copy=True).state_dict()  # complete, with embeddings and head

It computes head(P shadow(x)), without the corrections of the model's blocks. Li et al., 2026, arXiv:2604.19254.
"""

from __future__ import annotations

import copy as copies
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from ..core.config import TaskType
from ..core.layer import AdapterLayer
from ..errors import VeneerError
from ..methods.families.side_network import classification_loss, last_position
from ..targets.walk import bare
from ..upstream import cache as caches

if TYPE_CHECKING:
    from .peft_model import PeftModel


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """Backbone, projection and head of a shadow; classifies if the head is a classifier's, generates otherwise."""

    main_input_name = "input_ids"
    _supports_cache_class = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module,
        head: nn.Module | None,
        is_classification: bool = False,
        input_embeddings: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone.config)  # type: ignore[arg-type]
        self.backbone: Any = backbone
        self.shadow_hidden_projection: Any = projection
        self.head: Any = head
        self.is_classification = is_classification
        # The large model's embeddings are not registered as a submodule: they stay out of this model's checkpoint.
        self.__dict__["large_embeddings"] = input_embeddings
        if self.can_generate():
            self.generation_config = GenerationConfig.from_model_config(self.config)

    def can_generate(self) -> bool:  # type: ignore[override]
        # PreTrainedModel.__init__ calls this before the attributes are set.
        has_head = getattr(self, "head", None) is not None
        return has_head and not getattr(self, "is_classification", False)

    def get_input_embeddings(self) -> nn.Module:
        large_embeddings = self.__dict__.get("large_embeddings")
        if large_embeddings is not None:
            return large_embeddings
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.is_classification else self.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the logits and, if labels are given, the loss over next tokens or classes."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        arguments = {name: value for name, value in kwargs.items() if name in ("use_cache", "position_ids")}
        cache = caches.of_call(kwargs)
        if cache is not None:
            arguments = caches.with_cache(arguments, caches.argument(self.backbone), cache)
        out = self.backbone(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **arguments)
        states = self.shadow_hidden_projection(out.last_hidden_state)
        if self.is_classification:
            logits = self.head(last_position(states, attention_mask))
            loss = None if labels is None else classification_loss(logits, labels)
            return SequenceClassifierOutput(loss, logits)
        logits = states if self.head is None else self.head(states)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, caches.of_output(out))


def unload_shadow(model: PeftModel, adapter_name: str | None = None, copy: bool = False) -> DetachedShadowModel:
    """Detach the shadow of an adapter as a separate model; the large model is unchanged.

    Args:
        model: the large model with a shadow adapter.
        adapter_name: which adapter; None: the active one.
        copy: copy the modules instead of sharing them, so that the shadow can be saved with embeddings and head.

    Raises:
        VeneerError: the adapter is not a shadow.
    """
    state: Any = model._state
    name = adapter_name or next(iter(state.active), "")
    network = state.shared.get(name)
    if not hasattr(network, "shadow_backbone"):
        raise VeneerError(f"No shadow backbone found for adapter {name!r}.")
    base: Any = model.get_base_model()
    backbone = network.shadow_backbone["default"]
    projection = network.shadow_projection["default"]
    head = head_of(network, base)
    input_embeddings = base.get_input_embeddings() if network.reads_embeddings else None
    if copy:
        backbone = independent(backbone)
        projection = independent(projection)
        head = independent(head)
        if input_embeddings is not None:
            backbone.embed_tokens = independent(input_embeddings)
            input_embeddings = None
    is_classification = state.configs[name].task_type == TaskType.SEQ_CLS
    return DetachedShadowModel(backbone, projection, head, is_classification, input_embeddings)


def head_of(network: Any, base: Any) -> nn.Module | None:
    """The shadow's own head if it has one, else the large model's."""
    if hasattr(network, "shadow_head"):
        return network.shadow_head["default"]
    return base.get_output_embeddings()


def independent(module: nn.Module | None) -> Any:
    """A copy that shares no memory; the active adapters of an adapted module are folded into it."""
    if not isinstance(module, AdapterLayer):
        return copies.deepcopy(module)
    plain = copies.deepcopy(bare(module))
    stack = module.stack(module.state.live())
    if stack:
        plain.load_state_dict(plain.state_dict() | module.folded(stack))
    return plain
