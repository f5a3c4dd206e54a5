"""A shadow on its own: the small network that `ShadowConfig` trained beside a model, as a model that runs without it.

    small = veneer.unload_shadow(model)     # shares its modules with `model`
    small.generate(**batch)
    veneer.unload_shadow(model, copy=True).state_dict()  # whole, with embeddings and head

It gives head(P shadow(x)); the corrections of the model's blocks are not part of it. Li et al., 2026, arXiv:2604.19254.
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
    """Backbone, projection and head; with a classifier's head it classifies, else it generates."""

    main_input_name = "input_ids"
    _supports_cache_class = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

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
        self.__dict__["reads"] = input_embeddings  # of the large model, and no part of this one's checkpoint
        if self.can_generate():
            self.generation_config = GenerationConfig.from_model_config(self.config)

    def can_generate(self) -> bool:  # type: ignore[override]
        return getattr(self, "head", None) is not None and not getattr(self, "is_classification", False)

    def get_input_embeddings(self) -> nn.Module:
        found = self.__dict__.get("reads")
        return self.backbone.get_input_embeddings() if found is None else found

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
        """Logits, and with labels the loss: of the next tokens, or of the classes."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        kept = {k: v for k, v in kwargs.items() if k in ("use_cache", "position_ids")}
        cache = caches.of_call(kwargs)
        if cache is not None:
            kept = caches.with_cache(kept, caches.argument(self.backbone), cache)
        out = self.backbone(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kept)
        states = self.shadow_hidden_projection(out.last_hidden_state)
        if self.is_classification:
            logits = self.head(last_position(states, attention_mask))
            return SequenceClassifierOutput(None if labels is None else classification_loss(logits, labels), logits)
        logits = states if self.head is None else self.head(states)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, caches.of_output(out))


def unload_shadow(model: PeftModel, adapter_name: str | None = None, copy: bool = False) -> DetachedShadowModel:
    """The shadow of an adapter as a model of its own; the large model stays as it is.

    Args:
        adapter_name: None: the active adapter.
        copy: with modules of its own, so that it can be saved whole.

    Raises:
        VeneerError: the adapter is no shadow.
    """
    state: Any = model._state
    name = adapter_name or next(iter(state.active), "")
    network = state.shared.get(name)
    if not hasattr(network, "shadow_backbone"):
        raise VeneerError(f"No shadow backbone found for adapter {name!r}.")
    base: Any = model.get_base_model()
    own = [network.shadow_backbone["default"], network.shadow_projection["default"], head_of(network, base)]
    reads = base.get_input_embeddings() if network.reads_embeddings else None
    backbone, projection, head = (independent(module) for module in own) if copy else own
    if copy and reads is not None:
        backbone.embed_tokens, reads = independent(reads), None
    is_classification = state.configs[name].task_type == TaskType.SEQ_CLS
    return DetachedShadowModel(backbone, projection, head, is_classification, reads)


def head_of(network: Any, base: Any) -> nn.Module | None:
    """The shadow's own head, or the model's."""
    return network.shadow_head["default"] if hasattr(network, "shadow_head") else base.get_output_embeddings()


def independent(module: nn.Module | None) -> Any:
    """A copy that shares no memory; of an adapted module with the active adapters folded in."""
    if not isinstance(module, AdapterLayer):
        return copies.deepcopy(module)
    plain = copies.deepcopy(bare(module))
    stack = module.stack(module.state.live())
    plain.load_state_dict(plain.state_dict() | (module.folded(stack) if stack else {}))
    return plain
