"""State dicts of adapters and of base models under PEFT's names, and weight files as PEFT loads them."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checkpoint, embeddings, provenance
from ..core.adapter import Replace
from ..core.config import PromptConfig
from ..core.placement import settle
from ..core.prompt import Prompt
from ..core.state import State, state_of
from ..errors import CheckpointError, VeneerError
from ..files.find import find_file
from ..files.read import PICKLE_NAME, PREFIX, WEIGHTS_NAME
from ..targets.walk import walk
from .old_experts import EXACT_TARGETS, any_old, modern
from .strict import is_strict
from .tables import methods as table

"""The prefix of the keys in PEFT's files."""
LoadResult = namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])  # type: ignore[name-match]


def root_of(model: Any) -> tuple[nn.Module, State, bool]:
    """(the adapted model, its state, whether its keys have PEFT's prefix)."""
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "module", model)
    if hasattr(model, "get_base_model"):
        inner = model.get_base_model()
    state = state_of(inner)
    if state is None:
        raise VeneerError("the model has no adapters")
    return inner, state, inner is not model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter by their keys in a file; those of a model outside a `PeftModel` have no prefix."""
    inner, state, has_prefix = root_of(model)
    config = state.configs[adapter_name]
    with_embeddings = None if save_embedding_layers == "auto" else bool(save_embedding_layers)
    if with_embeddings and not hasattr(inner, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=2
        )
        with_embeddings = False
    base_embeddings = embeddings.to_save(inner, state, config, with_embeddings)
    if with_embeddings is None and base_embeddings:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=2
        )
    tensors = checkpoint.slots(state, adapter_name) | base_embeddings
    if state_dict is not None:
        tensors |= _taken_from(state_dict, loaded_names(state, adapter_name, has_prefix))
    if has_prefix:
        return tensors
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _taken_from(state_dict: Mapping[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """An adapter's tensors by their keys in a file, from a whole model's (perhaps gathered) state dict."""
    keys = {name: key for key, name in names.items()}
    return {keys[name]: tensor for name, tensor in state_dict.items() if name in keys}


def loaded_names(state: State, name: str, has_prefix: bool) -> dict[str, str]:
    """The names of an adapter's tensors in the model's own state dict, by their keys in a file."""
    names = {}
    for prefix, part in checkpoint.parts(state, name):
        for key in checkpoint.export(part):
            full = prefix + key
            loaded = named(full, name, part)
            names[full] = loaded if has_prefix else loaded.removeprefix(PREFIX)
    return names


def named(full: str, name: str, part: Any) -> str:
    """A file's key with the adapter's name inserted as in PEFT's models: `lora_A.default.weight`."""
    if isinstance(part, Prompt):
        return f"prompt_encoder.{name}.embedding.weight" if full == "prompt_embeddings" else full
    keys = sorted(checkpoint.export(part), key=len, reverse=True)
    key = next(key for key in keys if full.endswith(key))
    path = full.removesuffix(key)
    if isinstance(part, Replace):
        return f"{path}modules_to_save.{name}.{key}"
    if key in table.IN_MODULES:
        key = f"{key}.weight"
    attribute, dot, rest = key.partition(".")
    return f"{path}{attribute}.{name}{dot}{rest}"


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Load tensors, by their keys in a file, into an adapter. Returns the missing and the unexpected keys.

    Raises:
        RuntimeError: shapes differ, as in torch.
    """
    inner, state, has_prefix = root_of(model)
    tensors = _todays(peft_model_state_dict, state.configs[adapter_name], has_prefix)
    own = checkpoint.slots(state, adapter_name)
    repeats = checkpoint.repeats(state, adapter_name)
    fitting = {}
    base_embeddings = {}
    unexpected = []
    for key, tensor in tensors.items():
        if key in own:
            fitting[key] = tensor
        elif embeddings.is_one(key):
            base_embeddings[key] = tensor
        elif key not in repeats:
            unexpected.append(key if has_prefix else key.removeprefix(PREFIX))
    _check_shapes(own, fitting, ignore_mismatched_sizes, type(model).__name__)
    names = loaded_names(state, adapter_name, has_prefix)
    missing = [names[key] for key in own if key not in fitting]
    _absorb(state, adapter_name, {**own, **fitting})
    embeddings.Brought(embeddings.among(base_embeddings, inner, own, ()))
    settle(inner, state, adapter_name, lift=_is_lifted(state, adapter_name))
    return LoadResult(missing, unexpected)


def _todays(state_dict: Mapping[str, Tensor], config: Any, has_prefix: bool) -> dict[str, Tensor]:
    """Tensors with their keys converted to the current file format, with PEFT's prefix."""
    names = checkpoint.renamed()
    tensors = {checkpoint.current_key(key, names): tensor for key, tensor in state_dict.items()}
    if any_old(tensors):
        tensors = modern(tensors)
    if has_prefix or isinstance(config, PromptConfig):
        return tensors
    return {key if key.startswith("base_model.") else PREFIX + key: tensor for key, tensor in tensors.items()}


def _check_shapes(own: dict[str, Tensor], fitting: dict[str, Tensor], ignore: bool, model: str) -> None:
    """Drop tensors whose shapes differ, with a warning, if they are to be ignored; else raise RuntimeError."""
    mismatches = {}
    for key, tensor in fitting.items():
        if own[key].shape != tensor.shape:
            in_file = tuple(tensor.shape)
            mismatches[key] = f"size mismatch for {key}: {in_file} in the file, {tuple(own[key].shape)} here"
    if not mismatches:
        return
    if not ignore:
        raise RuntimeError(f"Error(s) in loading state_dict for {model}:\n\t" + "\n\t".join(mismatches.values()))
    warnings.warn(
        f"Some weights of {model} were not initialized from the model checkpoint and are being ignored because "
        "you passed `ignore_mismatched_sizes=True`: " + "; ".join(mismatches.values()),
        stacklevel=4,
    )
    for key in mismatches:
        del fitting[key]


def _absorb(state: State, name: str, tensors: dict[str, Tensor]) -> None:
    """Load tensors into an adapter; zeros for those that are still placeholders on the meta device."""
    if any(tensor.is_meta for tensor in tensors.values()):
        for _, part in checkpoint.parts(state, name):
            if any(tensor.is_meta for tensor in part.state_dict().values()):
                part.to_empty(device="cpu")
        tensors = {key: torch.zeros_like(t, device="cpu") if t.is_meta else t for key, t in tensors.items()}
    checkpoint.absorb(state, name, tensors)


def _is_lifted(state: State, name: str) -> bool:
    """Whether no parameter of an adapter is in half precision."""
    return not any(p.dtype in (torch.float16, torch.bfloat16) for p in state.parameters(name))


# Files


def load_peft_weights(
    model_id: str | Path, device: str | None = None, key_mapping: Mapping[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter's weight file by key. A pickle is read by torch's restricted unpickler."""
    from safetensors.torch import load_file

    hub.pop("user_agent", None)
    hub.pop("use_auth_token", None)
    where = str(device) if device is not None else infer_device()
    try:
        path = find_file(model_id, WEIGHTS_NAME, **hub)
        tensors = load_file(str(path), device=where)
    except CheckpointError:
        if is_strict():
            raise
        tensors = torch.load(_pickle_of(model_id, hub), map_location=where, weights_only=True)
    return checkpoint.with_other_keys(tensors, key_mapping)


def note_exact_targets(config: Any, model_id: str | Path, **hub: Any) -> None:
    """Note in a config if veneer wrote its file: its targets are then modules of today's architecture.

    In a file of PEFT, "gate_proj" of a mixture of experts stands for the fused parameter of the experts. In one of
    veneer, it is a linear layer, such as that of a shared expert.
    """
    from safetensors import SafetensorError, safe_open

    hub.pop("user_agent", None)
    try:
        path = find_file(model_id, WEIGHTS_NAME, **hub)
        with safe_open(str(path), framework="pt") as file:
            is_ours = provenance.KEY in (file.metadata() or {})
    except (CheckpointError, SafetensorError):
        return  # loading the weights says what is wrong
    if is_ours:
        config.__dict__[EXACT_TARGETS] = True


def _pickle_of(source: str | Path, hub: dict[str, Any]) -> Path:
    try:
        return find_file(source, PICKLE_NAME, **hub)
    except CheckpointError as error:
        raise CheckpointError(
            f"Can't find weights for {source} in {source} or in the Hugging Face Hub. Please check that the file "
            f"{PICKLE_NAME} or {WEIGHTS_NAME} is present at {source}."
        ) from error


def infer_device() -> str:
    """The device that tensors are loaded to by default."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# The base model


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base model's tensors under the names that they have without adapters."""
    inner = root_of(model)[0]
    tensors: dict[str, Tensor] = {}
    for path, module in walk(inner):
        if path.startswith(("veneer_shared", "veneer_prompts")):
            continue
        prefix = f"{path}." if path else ""
        for name, tensor in _saved_tensors(module):
            tensors[prefix + name] = tensor
    return tensors


def _saved_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter.data
    for name in set(module._buffers) - module._non_persistent_buffers_set:
        buffer = module._buffers[name]
        if buffer is not None:
            yield name, buffer


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Load tensors into the base model, under the names that they have without adapters.

    Raises:
        RuntimeError: keys are missing or unexpected, and `strict` is set.
    """
    own = get_base_model_state_dict(model)
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    problems = []
    if missing:
        problems.append(f"Missing key(s) in state_dict: {missing}")
    if unexpected:
        problems.append(f"Unexpected key(s) in state_dict: {unexpected}")
    if strict and problems:
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(problems))
    with torch.no_grad():
        for key, tensor in state_dict.items():
            if key in own:
                own[key].copy_(tensor)
    return LoadResult(missing, unexpected)
