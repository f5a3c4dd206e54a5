"""PEFT's helpers for models: preparing, casting, freezing, dequantising, FSDP wrapping, default targets."""

from __future__ import annotations

import copy
import functools
import importlib.util
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
"""Quantisation methods other than bitsandbytes' that `prepare_model_for_kbit_training` prepares."""


class PeftWarning(UserWarning):
    """PEFT's own warnings."""


class DefaultTargets(MutableMapping[str, Any]):
    """A method's default targets by model type, computed on access from a model of that type without weights."""

    def __init__(self, kind: Any, field: str = "target_modules") -> None:
        self.kind = kind
        self.field = field
        self.given: dict[Any, Any] = WRITTEN.setdefault((kind, field), {})
        """The entries that a program has set, instead of the computed defaults."""

    def __getitem__(self, model_type: str) -> Any:
        if model_type in self.given:
            return self.given[model_type]
        targets = default(self.kind.value, self.field, model_type)
        return self._by_role(model_type) if targets is None else targets

    def _by_role(self, model_type: str) -> Any:
        """The targets that veneer chooses on a model of this type."""
        from ..files.skeleton import skeleton

        config_class = CONFIGS[self.kind]
        config = config_class(**dict(config_class.example))
        if not isinstance(config, LayerConfig):
            raise KeyError(model_type)
        try:
            config.fill_targets(skeleton(model_type=model_type))
        except (VeneerError, TypeError, ValueError, AttributeError):
            raise KeyError(model_type) from None
        return list(getattr(config, self.field) or ())

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
    """Freeze a quantised model, upcast what is not quantised to fp32, and enable gradient checkpointing."""
    settings = gradient_checkpointing_kwargs or {}
    method = str(getattr(model, "quantization_method", "")).rpartition(".")[2].lower()
    is_in_8bit = getattr(model, "is_loaded_in_8bit", False)
    is_in_4bit = getattr(model, "is_loaded_in_4bit", False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if method not in QUANTISED and parameter.dtype in HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    is_quantised = is_in_8bit or is_in_4bit or method in QUANTISED
    if is_quantised and use_gradient_checkpointing:
        if settings.get("use_reentrant", True) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to `dtype` and trainable ones to fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Decoder inputs from labels, (batch, length): shifted right by one, with padding in place of -100.

    Raises:
        ValueError: there is no padding token.
    """
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(past_key_values: Any) -> Any:
    """The keys and values of a prefix in the cache layout of older BLOOM models."""
    pairs = torch.cat(past_key_values)  # (2 layers, rows, heads, length, width)
    layers = len(pairs) // 2
    _, rows, heads, length, width = pairs.shape
    keys = pairs[:layers].transpose(2, 3).reshape(layers, rows * heads, width, length)
    values = pairs[layers:].reshape(layers, rows * heads, length, width)
    return tuple(zip(keys, values, strict=True))


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight, transposed if `fan_in_fan_out`."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """An identity of a tensor's memory: equal for tensors that share their storage."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def str_to_bool(value: str) -> int:
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value}")


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed and, unless told otherwise, finds a device."""
    if importlib.util.find_spec("torch_xla") is None:
        return False
    if not check_device:
        return True
    from torch_xla.core import xla_model

    try:
        xla_model.xla_device()
    except RuntimeError:
        return False
    return True


def is_xpu_available(check_device: bool = False) -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def get_submodules(model: nn.Module, key: str) -> tuple[Any, Any, str]:
    """(parent, module, its name in the parent) of a path."""
    path, _, name = key.rpartition(".")
    parent = model.get_submodule(path)
    return parent, model.get_submodule(key), name


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad_(False)


def get_device_map(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "hf_device_map", {}))


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The path of a module in a model; "" if the model does not contain it."""
    for name, module in model.named_modules():
        if module is reference_module:
            return name
    return ""


# Training in shards


def no_split_modules(model: Any) -> set[str]:
    """The class names of the modules that a model says must not be split over devices."""
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    return names


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """An FSDP policy that wraps an adapted model's transformer layers; adapters belong to the unit of their layer.

    Raises:
        TypeError: the model has no module of a class to wrap.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    names = ",".join(sorted(no_split_modules(model)))
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", names)
    classes = {type(module).__name__: type(module) for module in model.modules()}
    wrapped = set()
    for name in filter(None, names.split(",")):
        if name not in classes:
            raise TypeError("Could not find the transformer layer class to wrap in the model.")
        wrapped.add(classes[name])
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=wrapped)


# Temporary changes


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of every LoRA within the context.

    Raises:
        TypeError: the multiplier is not a number.
        ValueError: the model has no LoRA.
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
    """Only sets a flag, for PEFT compatibility: veneer always casts inputs to the adapter's dtype and outputs back."""
    layers = []
    if active:
        layers = [module for module in model.modules() if isinstance(module, PeftLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


REGISTER = nn.Module.register_parameter
"""torch's own function, which `init_empty_weights` replaces within its context."""


def init_empty_weights(include_buffers: bool | None = None) -> Any:
    """Create parameters on the meta device within the context."""
    from accelerate import init_empty_weights as on_meta

    return on_meta(include_buffers=bool(include_buffers))


def skip_init_on_device(func: Any) -> Any:
    """Decorate a function to create real parameters, even if it is called within `init_empty_weights`."""

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = nn.Module.register_parameter
        nn.Module.register_parameter = REGISTER  # type: ignore[method-assign]
        try:
            return func(*args, **kwargs)
        finally:
            nn.Module.register_parameter = before  # type: ignore[method-assign]

    return call


@contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: Any = None) -> Iterator[None]:
    """Gather parameters that DeepSpeed's ZeRO-3 has sharded, within the context."""
    parameters = param if isinstance(param, Iterable) else [param]
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """A linear module's weight, (out, in), dequantised."""
    if quantised(module) is None:
        return module.weight  # type: ignore[return-value]
    layer = AdapterLayer(module, "", State(AdapterLayer))
    return layer.target.weight()


def dequantize_bnb_weight(weight: Any, state: Any = None) -> Tensor:
    """A weight dequantised, if it is one of bitsandbytes'."""
    kind = type(weight).__name__
    if kind not in ("Params4bit", "Int8Params"):
        return weight
    from bitsandbytes import functional as F

    if kind == "Params4bit":
        return F.dequantize_4bit(weight.data, weight.quant_state)
    SCB = weight.SCB if weight.SCB is not None else state.SCB
    return weight.data.float() * (SCB / 127).view(-1, 1)


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Replace "all-linear" in a config by the names of the model's linear layers other than its head."""
    if peft_config.target_modules != "all-linear":
        return peft_config
    modules = dict(walk(model))
    heads = head_paths(model, modules)
    names = set()
    for path, module in modules.items():
        if is_linear(module) and path not in heads:
            names.add(path.rpartition(".")[2])
    peft_config.target_modules = Names(names)
    return peft_config


class MontecloraTrainerMixin:
    """For PEFT compatibility: the model's own loss includes MonteCLoRA's divergences, under any trainer."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]


class DoraCaching:
    """No-op; kept for PEFT compatibility. PEFT caches DoRA's norms; veneer computes them in factored form."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: Any) -> None:
        pass

    def __call__(self, enabled: bool = True) -> DoraCaching:
        return DoraCaching(enabled)


def update_signature(model: Any, method: str = "all") -> None:
    """Give a `PeftModel`'s forward, generate or both the signature and docstring of the base model's.

    Raises:
        ValueError: `method` is not "forward", "generate" or "all".
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    names = ("forward", "generate") if method == "all" else (method,)
    for name in names:
        base_method = getattr(model.get_base_model(), name)
        model.__dict__[name] = _documented_as(base_method, getattr(model, name))


def _documented_as(model_method: Any, method: Any) -> Any:
    """A function that calls `method` under the signature and docstring of `model_method`."""

    @functools.wraps(model_method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


def update_forward_signature(model: Any) -> None:
    update_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    update_signature(model, "generate")


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a directory or a repository on the Hub has an adapter's config."""
    from .configs import PeftConfig

    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # noqa: BLE001 - for any error, the config cannot be loaded
        return False
    return True


def get_quantization_config(model: Any, method: str) -> Any:
    """A model's quantisation config, if it is quantised by this method."""
    if getattr(model, "quantization_method", None) != method:
        return None
    config = getattr(model, "config", None)
    return getattr(config, "quantization_config", None)
