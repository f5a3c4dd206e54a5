"""PEFT's helpers around models: preparing, casting, freezing, measuring, wrapping policies, default targets."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import LayerConfig
from ..core.layer import AdapterLayer
from ..core.state import State
from ..errors import VeneerError
from ..targets.quantised import quantised
from ..targets.roles import head_paths, is_linear
from ..targets.walk import walk
from .configs import CONFIGS, Names
from .layers import PeftLayer
from .matching import WRITTEN
from .tables.targets import default

HALF = (torch.float16, torch.bfloat16)
QUANTISED = ("gptq", "aqlm", "eetq", "hqq", "torchao")


class PeftWarning(UserWarning):
    """PEFT's own warnings."""


class DefaultTargets(MutableMapping[str, Any]):
    """The modules a method adapts by default, by model type: read off an empty model of that type when asked for."""

    def __init__(self, kind: Any, field: str = "target_modules") -> None:
        self.kind, self.field = kind, field
        self.given: dict[Any, Any] = WRITTEN.setdefault((kind, field), {})

    def __getitem__(self, model_type: str) -> Any:
        if model_type in self.given:
            return self.given[model_type]
        own = default(self.kind.value, self.field, model_type)
        return self._found(model_type) if own is None else own

    def _found(self, model_type: str) -> Any:
        from ..files.skeleton import skeleton

        config = CONFIGS[self.kind]
        made = config(**dict(config.example))
        if not isinstance(made, LayerConfig):
            raise KeyError(model_type)
        try:
            made.fill_targets(skeleton(model_type=model_type))
        except (VeneerError, TypeError, ValueError, AttributeError):
            raise KeyError(model_type) from None
        return list(getattr(made, self.field) or ())

    def __setitem__(self, model_type: str, names: Any) -> None:
        self.given[model_type] = names

    def __delitem__(self, model_type: str) -> None:
        del self.given[model_type]

    def __iter__(self) -> Iterator[str]:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

        return iter({**MODEL_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **self.given})

    def __contains__(self, model_type: object) -> bool:
        return model_type in set(iter(self))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> DefaultTargets:
        return copy.copy(self)


# Preparing a model


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a quantised model, hold what is not quantised in fp32, and let activations be recomputed."""
    settings = gradient_checkpointing_kwargs or {}
    kind = str(getattr(model, "quantization_method", "")).rpartition(".")[2].lower()
    in_bits = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if kind not in QUANTISED and parameter.dtype in HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    if (in_bits or kind in QUANTISED) and use_gradient_checkpointing:
        if settings.get("use_reentrant", True) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen parameters in `dtype`, learned ones in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Decoder inputs of labels, (batch, length): one step later, -100 as padding.

    Raises:
        ValueError: no padding token is known.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(past_key_values: Any) -> Any:
    """Keys and values of a prefix in the layout of an old BLOOM's cache."""
    pairs = torch.cat(past_key_values)
    layers, rows, heads, length, width = pairs.shape
    keys, values = pairs[: layers // 2], pairs[layers // 2 :]
    keys = keys.transpose(2, 3).reshape(layers // 2, rows * heads, width, length)
    values = values.reshape(layers // 2, rows * heads, length, width)
    return tuple(zip(keys, values, strict=True))


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What two tensors that share their memory have in common."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def str_to_bool(value: str) -> int:
    words = {1: ("y", "yes", "t", "true", "on", "1"), 0: ("n", "no", "f", "false", "off", "0")}
    for number, spellings in words.items():
        if value.lower() in spellings:
            return number
    raise ValueError(f"invalid truth value {value}")


def is_xpu_available(check_device: bool = False) -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def get_submodules(model: nn.Module, key: str) -> tuple[Any, Any, str]:
    """(parent, module, its name in the parent) of a path."""
    above, _, name = key.rpartition(".")
    return model.get_submodule(above), model.get_submodule(key), name


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad_(False)


def get_device_map(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "hf_device_map", {}))


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is reference_module), "")


# Training in shards


def no_split_modules(model: Any) -> set[str]:
    found: set[str] = set()
    for module in model.modules():
        found |= set(getattr(module, "_no_split_modules", None) or ())
    return found


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """FSDP units of an adapted model: its transformer layers. An adapter stays in the unit of the layer it is on.

    Raises:
        TypeError: a class that is asked for is not in the model.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(no_split_modules(model)))).split(",")
    classes = {type(module).__name__: type(module) for module in model.modules()}
    wanted = [name for name in names if name]
    if any(name not in classes for name in wanted):
        raise TypeError("Could not find the transformer layer class to wrap in the model.")
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={classes[name] for name in wanted})


# Scaling and casting for a while


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside, the scaling of every LoRA is multiplied.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: there is no LoRA.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [m for m in model.modules() if isinstance(m, PeftLayer) and "scaling" in m.other_param_names]
    before = [(layer, dict(layer.scaling)) for layer in layers if layer.scaling]
    if not before:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    try:
        for layer, scaling in before:
            layer.scaling = {name: value * multiplier for name, value in scaling.items()}
        yield
    finally:
        for layer, scaling in before:
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """PEFT's switch; adapters here are given their own dtype always, and the result is the base's."""
    layers = [m for m in model.modules() if isinstance(m, PeftLayer)] if active else []
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


REGISTER = nn.Module.register_parameter
"""How torch notes a parameter, whatever `init_empty_weights` puts in its place for a while."""


def init_empty_weights(include_buffers: bool | None = None) -> Any:
    """Inside, parameters are made on the meta device."""
    from accelerate import init_empty_weights as on_meta

    return on_meta(include_buffers=bool(include_buffers))


def skip_init_on_device(func: Any) -> Any:
    """A function whose parameters have values, also when it is called inside `init_empty_weights`."""

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        before, nn.Module.register_parameter = nn.Module.register_parameter, REGISTER  # type: ignore[method-assign]
        try:
            return func(*args, **kwargs)
        finally:
            nn.Module.register_parameter = before  # type: ignore[method-assign]

    return call


@contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: Any = None) -> Iterator[None]:
    """Inside, parameters that DeepSpeed's ZeRO-3 has spread are whole."""
    if not any(hasattr(p, "ds_id") for p in (param if isinstance(param, Iterable) else [param])):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """A linear module's weight, (out, in), in floats."""
    if quantised(module) is None:
        return module.weight  # type: ignore[return-value]
    layer = AdapterLayer(module, "", State())
    return layer.target.weight()


def dequantize_bnb_weight(weight: Any, state: Any = None) -> Tensor:
    """The same of one of bitsandbytes' weights."""
    if type(weight).__name__ not in ("Params4bit", "Int8Params"):
        return weight
    from bitsandbytes import functional as F

    if type(weight).__name__ == "Params4bit":
        return F.dequantize_4bit(weight.data, weight.quant_state)
    SCB = weight.SCB if weight.SCB is not None else state.SCB
    return weight.data.float() * (SCB / 127).view(-1, 1)


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """A config with "all-linear" spelled out, by the names of the linear layers but the head's."""
    if peft_config.target_modules != "all-linear":
        return peft_config
    modules = dict(walk(model))
    heads = head_paths(model, modules)
    names = {path.rpartition(".")[2] for path, m in modules.items() if is_linear(m) and path not in heads}
    peft_config.target_modules = Names(names)
    return peft_config


class MontecloraTrainerMixin:
    """PEFT's mixin for trainers; the model's own loss has MonteCLoRA's divergences here, under any trainer."""


class DoraCaching:
    """PEFT's switch for keeping DoRA's norms; here they are computed in a cheap form each time."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: Any) -> None:
        pass

    def __call__(self, enabled: bool = True) -> DoraCaching:
        return DoraCaching(enabled)


def update_signature(model: Any, method: str = "all") -> None:
    """Give a `PeftModel`'s forward or generate the signature and the docstring of its base model's.

    Raises:
        ValueError: `method` is none of "forward", "generate", "all".
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for name in ("forward", "generate") if method == "all" else (method,):
        own, base = getattr(model, name), getattr(model.get_base_model(), name)

        def call(*args: Any, _own: Any = own, **kwargs: Any) -> Any:
            return _own(*args, **kwargs)

        model.__dict__[name] = functools.wraps(base)(call)


def update_forward_signature(model: Any) -> None:
    update_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    update_signature(model, "generate")


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a directory or a hub id holds an adapter."""
    from .configs import PeftConfig

    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # noqa: BLE001 - whatever keeps it from being read, it is none
        return False
    return True


def register_peft_method(**settings: Any) -> None:
    raise NotImplementedError(
        "a method is added to veneer as one file in veneer/methods; PEFT's register_peft_method is not part of this"
    )


def no_backend(*args: Any, **kwargs: Any) -> None:
    """Of a quantised base; its library dequantises it."""
    return None


def get_quantization_config(model: Any, method: str) -> Any:
    config = getattr(model, "config", None)
    is_such = getattr(model, "quantization_method", None) == method
    return getattr(config, "quantization_config", None) if is_such else None
