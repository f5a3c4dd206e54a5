"""State dicts of adapters and of base models under PEFT's names, and files read as they are."""

from __future__ import annotations

import re
import warnings
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checkpoint, embeddings
from ..core.config import PromptConfig
from ..core.placement import settle
from ..core.state import State, state_of
from ..errors import CheckpointError, VeneerError
from ..files.find import find_file
from ..files.read import PICKLE_NAME, WEIGHTS_NAME
from ..targets.walk import walk
from .old_experts import any_old, modern
from .strict import is_strict
from .tables import methods as table

PREFIX = "base_model.model."
LoadResult = namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])  # type: ignore[name-match]


def root_of(model: Any) -> tuple[nn.Module, State, bool]:
    """(the adapted model, its state, whether its keys have PEFT's prefix)."""
    model = getattr(model, "_orig_mod", model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", model)
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
    """The tensors of one adapter by their keys in a file; of a model without `PeftModel` around it, without prefix."""
    inner, state, has_prefix = root_of(model)
    config = state.configs[adapter_name]
    wanted = None if save_embedding_layers == "auto" else bool(save_embedding_layers)
    if wanted and not hasattr(inner, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=2
        )
        wanted = False
    beside = embeddings.to_save(inner, state, config, wanted)
    if wanted is None and beside:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=2
        )
    found = checkpoint.slots(state, adapter_name) | beside
    if state_dict is not None:
        found = _taken_from(state_dict, model, state, adapter_name, found, has_prefix)
    return found if has_prefix else {key.removeprefix(PREFIX): t for key, t in found.items()}


def _taken_from(
    given: Mapping[str, Tensor], model: nn.Module, state: State, name: str, found: dict[str, Tensor], has_prefix: bool
) -> dict[str, Tensor]:
    """The values that a whole model's state dict (gathered from its shards, say) has for an adapter's tensors."""
    places = {full: key for key, full in loaded_names(state, name, has_prefix).items()}
    return {**found, **{places[full]: t for full, t in given.items() if full in places}}


def loaded_names(state: State, name: str, has_prefix: bool) -> dict[str, str]:
    """Where the model's own state dict has each tensor of an adapter: with the adapter's name inside."""
    found = {}
    for prefix, part in checkpoint.parts(state, name):
        for key in checkpoint.export(part):
            full = prefix + key
            found[full] = named(full, name, part) if has_prefix else named(full, name, part).removeprefix(PREFIX)
    return found


def named(full: str, name: str, part: Any) -> str:
    """A file's key with the adapter's name where PEFT's models have it: `lora_A.default.weight`."""
    from ..core.adapter import Replace
    from ..core.prompt import Prompt

    if isinstance(part, Prompt):
        return f"prompt_encoder.{name}.embedding.weight" if full == "prompt_embeddings" else full
    own = checkpoint.export(part)
    key = next(key for key in sorted(own, key=len, reverse=True) if full.endswith(key))
    before = full.removesuffix(key)
    if isinstance(part, Replace):
        return f"{before}modules_to_save.{name}.{key}"
    head, dot, rest = key.partition(".")
    rest, dot = ("weight", ".") if key in table.IN_MODULES else (rest, dot)
    return f"{before}{head}.{name}{dot}{rest}"


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Put tensors, by their keys in a file, into an adapter. What is missing and what is over is returned.

    Raises:
        RuntimeError: shapes differ, as torch has it.
    """
    inner, state, has_prefix = root_of(model)
    config = state.configs[adapter_name]
    tensors = _todays(peft_model_state_dict, config, has_prefix)
    own = checkpoint.slots(state, adapter_name)
    brought = {k: t for k, t in tensors.items() if k not in own and embeddings.is_one(k)}
    fitting = {k: t for k, t in tensors.items() if k in own}
    _check_shapes(own, fitting, ignore_mismatched_sizes, type(model).__name__)
    names = loaded_names(state, adapter_name, has_prefix)
    again = checkpoint.repeats(state, adapter_name)
    missing = [names[key] for key in own if key not in fitting]
    unexpected = [k for k in tensors if k not in own and k not in brought and k not in again]
    _absorb(state, adapter_name, {**own, **fitting})
    embeddings.Brought(embeddings.among(brought, inner, own, ()))
    settle(inner, state, adapter_name, lift=_is_lifted(state, adapter_name))
    return LoadResult(missing, unexpected if has_prefix else [k.removeprefix(PREFIX) for k in unexpected])


def _todays(given: Mapping[str, Tensor], config: Any, has_prefix: bool) -> dict[str, Tensor]:
    names = checkpoint.renamed()
    start = "" if has_prefix or isinstance(config, PromptConfig) else PREFIX
    tensors = {checkpoint.current_key(key, names): t for key, t in given.items()}
    tensors = modern(tensors) if any_old(tensors) else tensors
    return {key if key.startswith("base_model.") else start + key: t for key, t in tensors.items()}


def _check_shapes(own: dict[str, Tensor], fitting: dict[str, Tensor], ignore: bool, model: str) -> None:
    wrong = [key for key, t in fitting.items() if own[key].shape != t.shape]
    lines = [f"size mismatch for {k}: {tuple(fitting[k].shape)} in the file, {tuple(own[k].shape)} here" for k in wrong]
    if wrong and not ignore:
        raise RuntimeError(f"Error(s) in loading state_dict for {model}:\n\t" + "\n\t".join(lines))
    if wrong:
        warnings.warn(
            f"Some weights of {model} were not initialized from the model checkpoint and are being ignored because "
            "you passed `ignore_mismatched_sizes=True`: " + "; ".join(lines),
            stacklevel=4,
        )
    for key in wrong:
        del fitting[key]


def _absorb(state: State, name: str, tensors: dict[str, Tensor]) -> None:
    on_meta = [k for k, t in tensors.items() if t.is_meta]
    if on_meta:
        for _, part in checkpoint.parts(state, name):
            if any(t.is_meta for t in part.state_dict().values()):
                part.to_empty(device="cpu")
        tensors = {k: torch.zeros_like(t, device="cpu") if t.is_meta else t for k, t in tensors.items()}
    checkpoint.absorb(state, name, tensors)


def _is_lifted(state: State, name: str) -> bool:
    return not any(p.dtype in (torch.float16, torch.bfloat16) for p in state.parameters(name))


# Files


def load_peft_weights(
    model_id: str | Path, device: str | None = None, key_mapping: Mapping[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter's file by key; of a pickle only tensors, by torch's restricted reader."""
    from safetensors.torch import load_file

    hub.pop("user_agent", None)
    hub.pop("use_auth_token", None)
    where = str(device) if device is not None else infer_device()
    try:
        tensors = load_file(str(find_file(model_id, WEIGHTS_NAME, **hub)), device=where)
    except CheckpointError:
        if is_strict():
            raise
        tensors = torch.load(_pickle_of(model_id, hub), map_location=where, weights_only=True)
    return {_mapped(key, key_mapping): t for key, t in tensors.items()} if key_mapping else tensors


def _pickle_of(source: str | Path, hub: dict[str, Any]) -> Path:
    try:
        return find_file(source, PICKLE_NAME, **hub)
    except CheckpointError as error:
        raise CheckpointError(
            f"Can't find weights for {source} in {source} or in the Hugging Face Hub. Please check that the file "
            f"{PICKLE_NAME} or {WEIGHTS_NAME} is present at {source}."
        ) from error


def _mapped(key: str, mapping: Mapping[str, str]) -> str:
    """A key under the first of the patterns that changes it; PEFT's prefix stands outside."""
    prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), "")
    inner = key.removeprefix(prefix)
    for pattern, replacement in mapping.items():
        changed, count = re.subn(pattern, replacement, inner)
        if count:
            return prefix + changed
    return key


def infer_device() -> str:
    """Where tensors go when nobody says."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# The base model


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The base model's tensors under the names it has without adapters."""
    inner = root_of(model)[0]
    return {f"{p}.{n}" if p else n: t for p, n, t in _base_tensors(inner)}


def _base_tensors(inner: nn.Module) -> Any:
    for path, module in walk(inner):
        if path.startswith(("veneer_shared", "veneer_prompts")):
            continue
        kept = set(module._buffers) - module._non_persistent_buffers_set
        yield from ((path, name, p.data) for name, p in module._parameters.items() if p is not None)
        yield from ((path, name, module._buffers[name]) for name in kept if module._buffers[name] is not None)


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Put tensors under the names the base model has without adapters into it.

    Raises:
        RuntimeError: keys are missing or over, where `strict`.
    """
    own = get_base_model_state_dict(model)
    missing, unexpected = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
    if strict and (missing or unexpected):
        parts = [f"Missing key(s) in state_dict: {missing}"] if missing else []
        parts += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected else []
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(parts))
    with torch.no_grad():
        for key, tensor in state_dict.items():
            if key in own:
                own[key].copy_(tensor)
    return LoadResult(missing, unexpected)
