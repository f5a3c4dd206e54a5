"""Small functions of PEFT's `utils`, `tuners` and `auto` that stand on their own."""

from __future__ import annotations

import copy
import os
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.families.replication import replicate
from ..targets.roles import is_linear
from ..targets.walk import walk
from .matching import check_target_module_exists

IMPORTABLE = ["diffusers", "lerobot", "megatron-core", "transformers"]


def get_default_import_allowlist() -> list[str]:
    """The packages from which `AutoPeftModel` takes the class of a base model."""
    return list(IMPORTABLE)


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> bool:
    """Whether a module is one of the packages on a list, or inside one."""
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


# Checkpoints


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """`torch.load` of tensors only, unless told otherwise."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Whether a layer wraps an embedding or a linear layer."""
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: Any, is_embedding_in_target_modules: bool) -> str | None:
    """The path of an embedding; if it is adapted, the path of the module that its layer wraps."""
    wrapped = getattr(layer, "base_layer", None)
    for name, module in model.named_modules():
        if module is wrapped or (module is layer and not is_embedding_in_target_modules):
            return name
    return None


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository has a file; None if that cannot be found out, as without a network."""
    from huggingface_hub import file_exists
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    from .utils import str_to_bool

    if str_to_bool(os.environ.get("HF_HUB_OFFLINE", "0")):
        return None
    try:
        return file_exists(repo_id, filename, **kwargs)
    except (HFValidationError, EntryNotFoundError):
        return None
    except Exception as error:  # noqa: BLE001 - the look-up is not needed
        warnings.warn(
            f"Unable to fetch remote file due to the following error {error} - silently ignoring the lookup for the "
            f"file {filename} in {repo_id}.",
            stacklevel=2,
        )
        return None


# Devices and quantised weights


def check_deepspeed_zero3_enabled() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def get_bnb_param_type(param: nn.Parameter) -> Any:
    """ "4bit" or "8bit" for a parameter of bitsandbytes, else False."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)


def get_layer_device_map(model: Any) -> dict[int, Any] | None:
    """The device of each layer of a model that accelerate has placed; that of offloaded layers is where they run.

    Raises:
        RuntimeError: a layer is on no device.
    """
    devices = model.hf_device_map
    main = next(device for device in devices.values() if device not in ("cpu", "disk"))
    running = {path: main if device in ("cpu", "disk") else device for path, device in devices.items()}
    count = model.config.num_hidden_layers
    by_layer = {}
    for i in range(count):
        for path, device in running.items():
            if path == "" or f".{i}." in f"{path}.":
                by_layer[i] = device
        if i not in by_layer:
            raise RuntimeError(f"layer {i} has not been mapped to a device.")
    return by_layer


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move the keys and values in a cache to the devices of their layers."""
    from transformers import Cache, EncoderDecoderCache

    if not (isinstance(cache, Cache) and hasattr(model, "hf_device_map")):
        return
    if isinstance(cache, EncoderDecoderCache):
        map_cache_to_layer_device_map(model, cache.self_attention_cache)
        return
    devices = get_layer_device_map(model) or {}
    for i, device in devices.items():
        layer = cache.layers[i]
        layer.keys = layer.keys.to(device)
        layer.values = layer.values.to(device)


def starcoder_model_postprocess_past_key_value(past_key_values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The keys and values of a prefix, (2, batch, heads, length, width), for GPT-BigCode's single key head."""
    first_heads = [pair[:, :, 0].permute(1, 2, 0, 3) for pair in past_key_values]
    return tuple(pair.flatten(2) for pair in first_heads)


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Bring the weights of a layer that accelerate offloads onto its device, within the context."""
    loaded = []
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            hook.pre_forward(module)
            loaded.append(module)
    try:
        yield
    finally:
        for module in loaded:
            hook = module._hf_hook
            if hook.weights_map is not None:
                for name, tensor in module.state_dict().items():
                    _keep(hook.weights_map, name, tensor)
            hook.post_forward(module, torch.tensor([]))


def _keep(weights: Any, name: str, tensor: Tensor) -> None:
    """Note a changed weight where accelerate loads it from."""
    prefix = getattr(weights, "prefix", "")
    inner = getattr(weights, "dataset", weights)
    inner = getattr(inner, "state_dict", inner)
    if prefix + name in inner:
        inner[prefix + name] = tensor.to("cpu", copy=True)


# Modules


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module, which can share its parameters with the module."""
    clone = copy.deepcopy(module)
    if share_weights:
        for name, parameter in module.named_parameters():
            path, _, last = name.rpartition(".")
            clone.get_submodule(path).register_parameter(last, parameter)
    return clone


def replicate_layers(model: nn.Module, layer_map: Sequence[tuple[int, int]]) -> None:
    """Repeat ranges of a model's blocks, in place; repeated blocks share their weights."""
    replicate(model, layer_map)


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """A mask with r (in + out) ones at random places of a linear layer's weight, (out, in)."""
    weight: Any = base_layer.weight
    out_features, in_features = weight.shape
    count = r * (out_features + in_features)
    generator = torch.Generator()
    if random_seed is not None:
        generator.manual_seed(random_seed)
    places = torch.randperm(weight.numel(), generator=generator)[:count]
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[places] = True
    return mask.view(weight.shape).to(weight.device)


def target_modules(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the linear layers that a config targets."""
    for path, module in walk(model):
        if path and is_linear(module) and check_target_module_exists(config, path):
            yield path, module


get_target_modules = target_modules


def find_equal_values(dictionary: Mapping[Any, Hashable]) -> dict[Any, list[Any]]:
    """The values that several keys of a dict have, each with those keys."""
    keys = defaultdict(list)
    for key, value in dictionary.items():
        keys[value].append(key)
    return {value: same for value, same in keys.items() if len(same) > 1}


def move_inputs_to_device(inputs: Any, device: Any) -> Any:
    """Move the tensors of a batch, which may be nested, to a device."""
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        moved = {name: move_inputs_to_device(value, device) for name, value in inputs.items()}
        return type(inputs)(moved)  # type: ignore[call-arg]
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(move_inputs_to_device(value, device) for value in inputs)
    warnings.warn(f"input of type {type(inputs)} could not be moved to the correct device", stacklevel=2)
    return inputs


def get_device_with_meta_params(model: nn.Module) -> torch.device | None:
    """The device of the parameters that are not placeholders; None, with a warning, if they are on several."""
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    if len(devices) > 1:
        warnings.warn(f"Could not determine device, model has multiple devices: {list(devices)}", stacklevel=2)
        return None
    return next(iter(devices))


def is_alora_relevant_in_batch(model: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """Whether the active adapter, or one that a mixed batch names, is an aLoRA."""
    names = [*model.active_adapters, *(adapter_names or ())]
    configs = [model.peft_config[name] for name in names if name in model.peft_config]
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)
