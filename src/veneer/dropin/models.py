"""PEFT's model classes: `PeftModel`, one subclass for each task, and `PeftMixedModel`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from ..core.calls import batch_size
from ..core.config import TASK_HEADS, PromptConfig, TaskType
from ..core.state import BASE, State, state_of
from ..errors import CheckpointError, ConfigError, VeneerError
from ..model import peft_model as core
from ..upstream import checkpointing
from ..upstream.models import task_of
from ..upstream.trainer import recognise
from .attach import activate, put_on, set_requires_grad, take_off
from .configs import PeftConfig, PeftType, as_peft, hub_arguments
from .inside import constants
from .inside.shadow import show_cache, with_cache
from .layers import PeftLayer
from .matching import has_adapters
from .slots import PromptEncoders
from .state import get_peft_model_state_dict, load_peft_weights, note_exact_targets, set_peft_model_state_dict
from .status import get_layer_status, get_model_status
from .strict import is_strict, settle
from .tables import methods as table
from .tables.names import signature as pefts_signature
from .tables.refusals import check_beside
from .tuners import TUNERS, MixedModel


class PeftModel(core.PeftModel):
    """A model with adapters, as in PEFT: one adapter is active and trainable; files that lack tensors load too."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **ignored: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__["_active"] = adapter_name
        self.__dict__["_kind"] = as_peft(peft_config).peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._adapters_disabled = False
        self._is_prompt_learning = isinstance(peft_config, PromptConfig)
        with_heads(type(self), peft_config)
        inner = model.get_base_model() if isinstance(model, core.PeftModel) else model
        with core._flags_kept_on_error(inner):
            if self._is_prompt_learning:
                self.base_model = inner  # type: ignore[assignment]
                kind = str(getattr(self.peft_type, "value", self.peft_type))
                if kind in ("PREFIX_TUNING", "CARTRIDGE") and checkpointing.is_on(inner):
                    raise VeneerError(
                        f"{kind} does not work with gradient checkpointing, which drops the cache of the prompt; "
                        "turn gradient_checkpointing off"
                    )
                state = put_on(inner, peft_config, adapter_name, on_meta=low_cpu_mem_usage, lift=autocast_adapter_dtype)
                self.__dict__["_state_kept"] = state
                activate(state, adapter_name, peft_config.inference_mode)
                self.prompt_encoder = PromptEncoders(state)
                self.word_embeddings = inner.get_input_embeddings()  # type: ignore[operator]
            else:
                self.base_model = self._tuner(peft_config)(
                    inner, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype
                )
        self._require_input_grads(inner)
        recognise(core.PeftModel)

    @staticmethod
    def _tuner(config: Any) -> Any:
        return TUNERS[PeftType(config.peft_type.value)]

    def _require_input_grads(self, model: Any) -> None:
        """Make the embeddings' output require a gradient, as reentrant activation checkpointing needs."""
        if checkpointing.is_on(model) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Make the embeddings' output require a gradient, as reentrant checkpointing needs."""
        self._prepare_model_for_gradient_checkpointing(model)

    def _prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        for attribute in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized"):
            if getattr(model, attribute, False):
                return model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            embeddings = model.get_input_embeddings()
            embeddings.register_forward_hook(_require_output_grad)
        return model

    # Access

    @property
    def _state(self) -> State:
        if not self._is_prompt_learning:
            return self.base_model.state
        state = state_of(self.base_model)
        if state is not None:
            self.__dict__["_state_kept"] = state
        return self.__dict__["_state_kept"]

    def get_base_model(self) -> nn.Module:
        return self.base_model if self._is_prompt_learning else self.base_model.model

    def __getattr__(self, name: str) -> Any:
        return core._fall_through(self, name, "base_model")

    @property
    def peft_config(self) -> dict[str, Any]:  # type: ignore[override]
        return self._state.configs

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self._state.configs = value

    @property
    def active_adapter(self) -> Any:  # type: ignore[override]
        """The adapter name that was last set on this object; `base_model` may have several active adapters."""
        return self.__dict__["_active"]

    @active_adapter.setter
    def active_adapter(self, name: Any) -> None:
        self.__dict__["_active"] = name

    @property
    def active_adapters(self) -> list[str]:
        names = self.active_adapter if self._is_prompt_learning else self._state.active
        return [names] if isinstance(names, str) else list(names)

    @property
    def peft_type(self) -> Any:  # type: ignore[override]
        return self.__dict__["_kind"]

    @property
    def modules_to_save(self) -> set[str] | None:
        names: set[str] = set()
        for config in self.peft_config.values():
            names.update(getattr(config, "modules_to_save", None) or ())
        return names or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self._state.enabled

    @property
    def base_model_torch_dtype(self) -> Any:
        return getattr(self.base_model, "dtype", None)

    def get_prompt(self, batch_size: int, task_ids: Any = None, max_cache_len: int | None = None) -> Any:
        """The active prompt: embeddings, (batch, n, width), or a cache if it is keys and values.

        Args:
            max_cache_len: ignored; the cache grows.
        """
        prompt = self._state.prompts[self.active_adapters[0]]
        facts = {} if task_ids is None else {"task_ids": task_ids}
        pairs = prompt.key_values(facts)
        if pairs is None:
            learned = prompt.embeds(facts)
            return learned if learned.dim() == 3 else learned.expand(batch_size, -1, -1)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys.expand(batch_size, -1, -1, -1), values.expand(batch_size, -1, -1, -1), layer)
        return cache

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Any:
        tensors = self._state.prompts[adapter_name].export()
        return tensors["prompt_embeddings"]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self._is_prompt_learning and self.base_model.supports_lora_conversion(adapter_name)

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._check_names(args, kwargs)
        if self._has_alora():
            kwargs = self._without_invocation(args, kwargs)
        beams = kwargs.get("num_beams") or 1
        if beams > 1 and self._has_alora():
            raise VeneerError("Beam search not yet supported for aLoRA.")
        has_shadow = self.peft_type.value == "SHADOW" and self._state.enabled
        if has_shadow and kwargs.get("use_cache"):
            kwargs = with_cache(self.get_base_model(), kwargs)
        output = super().forward(*args, **kwargs)
        if has_shadow:
            show_cache(output)
        return output

    def _without_invocation(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call; aLoRA does not act on embeddings alone, in which it cannot find its tokens."""
        if args or kwargs.get("input_ids") is not None or kwargs.get("alora_offsets") is not None or is_strict():
            return kwargs
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            return kwargs
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass.",
            stacklevel=4,
        )
        return kwargs | {"alora_offsets": [None] * len(embeddings)}

    def _has_alora(self) -> bool:
        configs = self.peft_config.values()
        return any(getattr(config, "alora_invocation_tokens", None) for config in configs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._check_names(None, kwargs)
        return super().generate(*args, **kwargs)

    def _check_names(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise PEFT's errors for an invalid mixed batch."""
        if self.peft_type.value == "MULTITASK_PROMPT_TUNING" and kwargs.get("task_ids") is None and not is_strict():
            raise VeneerError("task_ids cannot be None")
        names = kwargs.get("adapter_names")
        if not isinstance(names, (list, tuple)):
            return
        if self.training and not is_strict():
            raise VeneerError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {BASE, *self.peft_config}
        unknown = sorted(set(names) - known)
        if unknown:
            raise VeneerError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        if any(layer.merged_adapters for layer in self._state.layers.values()):
            raise VeneerError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        rows = None if args is None else batch_size(args, kwargs)  # `generate` repeats the rows for its beams
        if rows is not None and rows != len(names):
            raise VeneerError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {rows} respectively."
            )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model computes what the base model does; afterwards the active adapters train again."""
        state = self._state
        before = state.enabled
        if not self._is_prompt_learning:
            before = self._warn_of_irregular(before)
            self.base_model.disable_adapter_layers()
        state.enabled = False
        self._adapters_disabled = True
        try:
            yield
        finally:
            state.enabled = before
            self._adapters_disabled = not before
            if before and not self._is_prompt_learning:
                self.base_model.enable_adapter_layers()

    def _warn_of_irregular(self, enabled: bool) -> bool:
        """Whether the layers are enabled after `disable_adapter`; if only some were before, all of them are."""
        layers = self._state.layers.values()
        switches = {layer.disable_adapters for layer in layers if isinstance(layer, PeftLayer)}
        is_irregular = len(switches) > 1
        if is_irregular:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=4,
            )
        return enabled or is_irregular

    # Adapters

    def add_adapter(  # type: ignore[override]
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        if adapter_name in self.peft_config:
            raise VeneerError(f"Adapter with name '{adapter_name}' already exists.")
        warn_of_prefix(peft_config, adapter_name)
        self._check_kind(peft_config)
        with_heads(type(self), peft_config)
        if not self._is_prompt_learning:
            self.base_model.inject_adapter(
                self.base_model.model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, config=peft_config
            )
            return
        active = self._state.active
        state = put_on(self.base_model, peft_config, adapter_name, on_meta=low_cpu_mem_usage)
        activate(state, active or adapter_name)

    def _check_kind(self, config: Any) -> None:
        present = self.peft_config.values()
        if present and as_peft(config).peft_type != self.peft_type:
            raise VeneerError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {config.peft_type}."
            )
        trainable = [c for c in (*present, config) if not c.inference_mode]
        if self.peft_type.value == "ADALORA" and len(trainable) > 1:
            raise VeneerError(
                "AdaLoraModel supports only 1 trainable adapter. When using multiple adapters, set inference_mode to "
                "True for all adapters except the one you want to train."
            )
        check_beside(config, present)
        with_bias = [c for c in (*present, config) if getattr(c, "bias", "none") != "none"]
        if len(with_bias) > 1:
            raise VeneerError(
                f"{type(self.base_model).__name__} supports only 1 adapter with bias. When using multiple adapters, "
                "set bias to 'none' for all adapters."
            )

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        if isinstance(adapter_name, str) and adapter_name not in self.peft_config:
            raise VeneerError(f"Adapter {adapter_name} not found.")
        if not isinstance(adapter_name, str):
            missing = [name for name in adapter_name if name not in self.peft_config]
            if missing or not is_strict():
                raise TypeError(
                    f"set_adapter takes one name, not {adapter_name!r}; use base_model.set_adapter for several"
                )
        self.active_adapter = adapter_name
        if self._is_prompt_learning:
            activate(self._state, adapter_name, inference_mode)
        else:
            self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        if self._is_prompt_learning:
            raise TypeError(
                f"Setting `requires_grad` is not supported for prompt learning methods like {self.peft_type.value}."
            )
        set_requires_grad(self, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise VeneerError(f"Adapter {adapter_name} does not exist")
        left = take_off(self.get_base_model(), adapter_name, self._state)
        if len(left) == 1 or self._is_prompt_learning:
            self.active_adapter = left[0] if left else []

    def _of_tuner(self, name: str) -> Any:
        """Look up a method of the tuner; prompt methods have no tuner."""
        if self._is_prompt_learning:
            raise AttributeError(f"'{type(self.base_model).__name__}' object has no attribute '{name}'")
        return getattr(self.base_model, name)

    @property
    def merge_adapter(self) -> Any:  # type: ignore[override]
        return self._of_tuner("merge_adapter")

    @property
    def unmerge_adapter(self) -> Any:  # type: ignore[override]
        return self._of_tuner("unmerge_adapter")

    @property
    def merge_and_unload(self) -> Any:  # type: ignore[override]
        return self._of_tuner("merge_and_unload")

    @property
    def unload(self) -> Any:  # type: ignore[override]
        return self._of_tuner("unload")

    @property
    def add_weighted_adapter(self) -> Any:  # type: ignore[override]
        return self._of_tuner("add_weighted_adapter")

    # Reports

    def get_layer_status(self) -> Any:
        return get_layer_status(self)

    def get_model_status(self) -> Any:
        return get_model_status(self)

    # Files

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **settings: Any,
    ) -> None:
        from ..model.to_lora import save_as_lora
        from .saving import save_adapter, write_card

        if os.path.isfile(save_directory):
            raise CheckpointError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if any(name not in self.peft_config for name in names):
            raise CheckpointError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(self.peft_config)} - got {selected_adapters}."
            )
        converts = path_initial_model_for_weight_conversion is not None
        if converts:
            for name in names:
                check_conversion(self.peft_config[name])
        directory = Path(save_directory)
        if is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
            write_card(self, directory)
        for name in names:
            into = directory if name == "default" else directory / name
            if converts:
                if is_main_process:
                    save_as_lora(into, self, adapter_name=name)
                continue
            state_dict = self.state_dict() if "state_dict" in self.__dict__ else None  # the caller replaced the method
            state_dict = settings.get("state_dict", state_dict)
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            save_adapter(self, name, into, tensors, safe_serialization, is_main_process)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        from .saving import write_card

        write_card(self, Path(output_dir))

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        from ..model.card import push

        return push(self, repo_id, **settings)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Any:
        hub, _ = cls._split_kwargs(settings)
        hub.pop("use_auth_token", None)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub)
            note_exact_targets(config, model_id, **hub)
        _check_trainable(config, is_trainable)
        config.inference_mode = not is_trainable
        _note_offload(config, ephemeral_gpu_offload)
        if key_mapping is None and not isinstance(config, PromptConfig):
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        model_class = cls if issubclass(cls, PeftMixedModel) else MODELS.get(config.task_type, cls)
        adapted = model_class(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        result = adapted.load_adapter(
            model_id,
            adapter_name,
            is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            **settings,
        )
        if result.missing_keys:
            message = f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}."
            settle(CheckpointError(_prefix_hint(config, adapter_name) + message))
        return adapted

    def load_adapter(  # type: ignore[override]
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Any:
        """Load another adapter, or other values into an existing one; return the missing and the unexpected keys."""
        hub, rest = self._split_kwargs(settings)
        hub.pop("use_auth_token", None)
        if adapter_name not in self.peft_config:
            config = PeftConfig.from_pretrained(model_id, **hub)
            note_exact_targets(config, model_id, **hub)
            self._check_new_adapter_config(config, is_trainable)
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
            if is_trainable:
                self.set_requires_grad(adapter_name)
        weights = load_peft_weights(model_id, torch_device, key_mapping, **hub)
        if rest.get("check_base") and not is_strict():
            rest.pop("check_base")
        result = set_peft_model_state_dict(
            self, weights, adapter_name, rest.get("ignore_mismatched_sizes", False), low_cpu_mem_usage
        )
        if not is_trainable:
            self.eval()
        return result

    def _check_new_adapter_config(self, peft_config: Any, is_trainable: bool) -> None:
        _check_trainable(peft_config, is_trainable)

    @classmethod
    def _split_kwargs(cls, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split into (arguments of the Hub's download, the rest)."""
        names = hub_arguments() | {"use_auth_token"}
        hub = {}
        rest = {}
        for name, value in given.items():
            if name in names:
                hub[name] = value
            else:
                rest[name] = value
        return hub, rest

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        return type(self.get_base_model())


def _require_output_grad(module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook that makes a module's output require a gradient."""
    output.requires_grad_(True)


def _note_offload(config: Any, wanted: bool) -> None:
    if hasattr(config, "runtime_config"):
        config.runtime_config.ephemeral_gpu_offload = wanted
    elif wanted:
        warnings.warn("Ephemeral GPU offloading is not supported for this model. Ignoring.", stacklevel=3)


def _check_trainable(config: Any, is_trainable: bool) -> None:
    if not isinstance(as_peft(config), PeftConfig):
        raise ConfigError(f"The input config must be a PeftConfig, got {type(config)}")
    if isinstance(config, PromptConfig) and is_trainable:
        raise VeneerError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")


def _prefix_hint(config: Any, name: str) -> str:
    """A likely reason for missing keys: the adapter's name is part of the prefix of its tensors."""
    prefix = table.METHODS[config.peft_type.value].prefix
    if name not in prefix:
        return ""
    return (
        f"Adapter name '{name}' should not be contained in the prefix '{prefix}'. "
        "This could be the potential reason for missing adapter keys. "
    )


def warn_of_prefix(config: Any, name: str) -> None:
    """Warn of an adapter's name that is part of the prefix of its tensors."""
    prefix = table.METHODS[str(as_peft(config).peft_type.value)].prefix
    if name in prefix:
        warnings.warn(
            f"Adapter name '{name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=3,
        )


def with_heads(cls: type, config: Any) -> None:
    """Add the heads that a task's model class trains to the config's `modules_to_save`."""
    heads = TASK_HEADS.get(getattr(cls, "task", None), ())  # type: ignore[call-overload, arg-type]
    if heads and hasattr(config, "modules_to_save"):
        present = list(config.modules_to_save or ())
        missing = [head for head in heads if head not in present]
        config.modules_to_save = present + missing


def taking(parameters: str) -> Any:
    """`forward` with these parameters, which a call may also give by position, in PEFT's order."""
    signature = pefts_signature(
        f"self, {parameters}, output_attentions=None, output_hidden_states=None, "
        "return_dict=None, task_ids=None, **kwargs"
    )

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        order = list(signature.parameters)[1:]
        given = dict(zip(order, args, strict=False)) | kwargs
        for name in order:
            if name in given and given[name] is None:
                del given[name]
        return PeftModel.forward(self, **given)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


class PeftModelForCausalLM(PeftModel):
    task = TaskType.CAUSAL_LM
    forward = taking("input_ids=None, attention_mask=None, inputs_embeds=None, labels=None")

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if task_ids is not None:
            kwargs["task_ids"] = task_ids
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        return self.get_base_model().prepare_inputs_for_generation  # type: ignore[union-attr]


class PeftModelForSeq2SeqLM(PeftModelForCausalLM):
    task = TaskType.SEQ_2_SEQ_LM
    forward = taking(
        "input_ids=None, attention_mask=None, inputs_embeds=None, decoder_input_ids=None, decoder_attention_mask=None, "
        "decoder_inputs_embeds=None, labels=None"
    )

    def generate(self, **kwargs: Any) -> Any:  # PEFT's takes no positional arguments
        return super().generate(**kwargs)


class PeftModelForSequenceClassification(PeftModel):
    task = TaskType.SEQ_CLS
    forward = taking("input_ids=None, attention_mask=None, inputs_embeds=None, labels=None")

    @property
    def cls_layer_name(self) -> str | None:
        heads = self.modules_to_save or ()
        for name, _ in self.get_base_model().named_children():
            if any(head in name for head in heads):
                return name
        return None


class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModelForSequenceClassification):
    task = TaskType.QUESTION_ANS
    forward = taking(
        "input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None, "
        "start_positions=None, end_positions=None"
    )


class PeftModelForFeatureExtraction(PeftModel):
    task = TaskType.FEATURE_EXTRACTION
    forward = taking("input_ids=None, attention_mask=None, inputs_embeds=None")


MODELS: dict[Any, Any] = {
    TaskType.SEQ_CLS.value: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM.value: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM.value: PeftModelForCausalLM,
    TaskType.TOKEN_CLS.value: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: PeftModelForFeatureExtraction,
}
MIXABLE = {PeftType(kind): TUNERS[PeftType(kind)] for kind, row in table.METHODS.items() if row.mixes}
"""PEFT's mapping of methods that can be mixed, with their tuners."""
MIXED = {*MIXABLE, *constants.COMPATIBLE_TUNER_TYPES}
"""The methods that `PeftMixedModel` accepts: those of PEFT's mapping, and those that its mixed model takes."""


class PeftMixedModel(PeftModel):
    """Adapters of several methods on one model, several of them active at a time; unlike PEFT's it saves and loads."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str = "default", *more: Any, **named: Any):
        _check_mixable(peft_config)
        super().__init__(model, peft_config, adapter_name, *more, **named)

    @staticmethod
    def _tuner(config: Any) -> Any:
        return MixedModel

    @property
    def active_adapter(self) -> Any:  # type: ignore[override]
        names = list(self._state.active)
        return names[0] if len(names) == 1 else names

    @active_adapter.setter
    def active_adapter(self, name: Any) -> None:
        self.set_adapter(name)

    def _check_kind(self, config: Any) -> None:
        _check_mixable(config)

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        names = self._existing_names(adapter_name)
        activate(self._state, names, inference_mode)

    def delete_adapter(self, adapter_name: Any) -> None:
        names = self._existing_names(adapter_name)
        layers = self._state.layers.values()
        merged = [name for name in names if any(name in layer.merged_adapters for layer in layers)]
        if merged:
            raise VeneerError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")
        for name in names:
            super().delete_adapter(name)

    def _existing_names(self, names: Any) -> list[str]:
        """Return one name or several as a list; raise VeneerError unless all are adapters of this model."""
        names = [names] if isinstance(names, str) else list(names)
        missing = set(names) - set(self.peft_config)
        if missing:
            raise VeneerError(f"Adapter(s) {sorted(missing)} not found, available adapters: {sorted(self.peft_config)}")
        return names

    def set_modules_to_save(self, peft_config: Any, adapter_name: str) -> None:
        """No-op; kept for PEFT compatibility. `modules_to_save` are trained as soon as their adapter is attached."""

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self.base_model.unload(*args, **kwargs)

    def get_layer_status(self) -> Any:
        raise TypeError(f"get_layer_status is not supported for {type(self).__name__}.")

    def get_model_status(self) -> Any:
        raise TypeError(f"get_model_status is not supported for {type(self).__name__}.")


def _check_mixable(config: Any) -> None:
    if as_peft(config).peft_type not in MIXED:
        raise VeneerError(
            f"The provided `peft_type` '{config.peft_type.value}' is not compatible with the `PeftMixedModel`. "
            f"Compatible types are: {sorted(kind.value for kind in MIXED)}"
        )


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Freeze a model and attach a new adapter to it."""
    _note_base(model, peft_config, revision)
    if has_adapters(model):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    if getattr(peft_config, "init_lora_weights", None) == "eva" and not low_cpu_mem_usage:
        warnings.warn(
            "lora with eva initialization used with low_cpu_mem_usage=False. Setting low_cpu_mem_usage=True can "
            "improve the maximum batch size possible for eva initialization.",
            stacklevel=2,
        )
    warn_of_prefix(peft_config, adapter_name)
    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name)
    task = peft_config.task_type
    if task not in MODELS and isinstance(peft_config, PromptConfig):
        task = task_of(model)
    model_class = MODELS.get(task, PeftModel)
    return model_class(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _note_base(model: Any, config: Any, revision: str | None) -> None:
    """Record in the config where the base model came from."""
    old = config.base_model_name_or_path
    new = model.__dict__.get("name_or_path") or None
    if old is not None and old != new:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=3,
        )
    config.base_model_name_or_path = new
    if revision is not None:
        if config.revision not in (None, revision):
            warnings.warn(
                f"peft config has already set base model revision to {config.revision}, overwriting with revision "
                f"{revision}",
                stacklevel=3,
            )
        config.revision = revision


def check_conversion(config: Any) -> None:
    """Raise ConfigError if PEFT cannot convert a LoRA to a plain one, because a file cannot express its scalings."""
    patterns = getattr(config, "rank_pattern", None) or getattr(config, "alpha_pattern", None)
    if getattr(config, "use_rslora", False) and patterns:
        raise ConfigError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )
