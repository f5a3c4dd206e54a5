"""Reading and writing adapters in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A key is the place of a part in the model, then the attribute's name. Saving and loading are one walk over the parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, CheckpointError, listing
from ..files import WEIGHTS_NAME, find_weights, replacing
from .adapter import Adapter, Replace, Tensors
from .config import METHODS, Config, PromptConfig
from .context import State
from .layer import walk
from .prompt import Prompt
from .target import kind_of

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""PEFT's files hold the whole base module when `target_modules` lists one of these."""


# Where things are


def parts(state: State, name: str) -> Iterator[tuple[str, Adapter | Prompt | nn.Module]]:
    """(key prefix, part) of everything saved under an adapter's name."""
    below = "base_model." if isinstance(state.configs[name], PromptConfig) else "base_model.model."
    for path, adapter in state.adapters(name).items():
        for part in adapter.parts:
            yield f"{below if isinstance(part, Replace) else 'base_model.model.'}{path}.{part.key}", part
    if name in state.shared:
        yield "base_model.", state.shared[name]
    if name in state.prompts:
        yield "", state.prompts[name]


def export(part: Any) -> Tensors:
    return part.export() if hasattr(part, "export") else part.state_dict()


def slots(state: State, name: str) -> Tensors:
    """Every tensor of an adapter by its key in the file."""
    return {prefix + key: t for prefix, part in parts(state, name) for key, t in export(part).items()}


def repeats(state: State, name: str) -> dict[str, str]:
    """Keys that a file may hold besides the slots, each with the slot whose tensor it repeats."""
    layers = [(prefix, part) for prefix, part in parts(state, name) if isinstance(part, Adapter)]
    return {
        prefix + key: f"base_model.model.{whose}" for prefix, part in layers for key, whose in part.repeats().items()
    }


# Writing


def collect(model: nn.Module, state: State, name: str, embeddings: bool | None) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by key, notes) of an adapter, whole and on the CPU. Every process of a sharded run must take part."""
    tensors = slots(state, name) | base_embeddings(model, state, state.configs[name], embeddings)
    notes = {"base": fingerprint(base_weights(model, state, name))}
    seen: set[int] = set()
    return {key: _whole(t, seen) for key, t in tensors.items()}, notes


def write(directory: Path, tensors: Tensors, notes: dict[str, Any], config: Config) -> None:
    """Write one adapter. Each file is written beside the old one and renamed over it when whole."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "veneer": json.dumps(notes)}
    with replacing(directory / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata)
    config.save_pretrained(directory)


def base_embeddings(model: Any, state: State, config: Config, wanted: bool | None) -> Tensors:
    """Base embeddings that the file holds beside the adapter, by PEFT's rule or on request."""
    targets = getattr(config, "target_modules", None)
    named = [n for n in EMBEDDING_NAMES if isinstance(targets, list) and n in targets]
    if not config.file_holds_embedding or wanted is False or not (named or wanted):
        return {}
    names = EMBEDDING_NAMES if wanted or config.ties() else tuple(named)
    found: Tensors = {}
    for path, module in walk(model):
        if path.rpartition(".")[2] in names and isinstance(getattr(module, "weight", None), Tensor):
            infix = "base_layer." if path in state.layers else ""
            found[f"base_model.model.{path}.{infix}weight"] = module.weight
    return found


def _whole(t: Tensor, seen: set[int]) -> Tensor:
    """A tensor on the CPU: gathered if sharded, contiguous, and sharing memory with none of those whose are `seen`."""
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    if t.is_meta:
        raise CheckpointError("the adapter has no values yet (it lies on the meta device); there is nothing to save")
    t, memory = t.detach(), t.untyped_storage()
    is_own = t.is_contiguous() and memory.nbytes() == t.nbytes and memory.data_ptr() not in seen
    seen.add(memory.data_ptr())
    return t.to("cpu", copy=not is_own).contiguous()


# Reading


def read(source: str | Path, **hub: Any) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by key, veneer's own notes) of an adapter's weight file.

    Raises:
        CheckpointError: no file, a pickle, a broken file, or values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    path = find_weights(source, **hub)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # cloned into memory of torch's own alignment: in the file's, products can differ in the last bits
            names = renamed()
            tensors = {_todays(key, names): file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    broken = not_finite(tensors)
    if broken:
        raise CheckpointError(f"{str(path)!r} holds values that are not finite in:{listing(broken)}")
    return tensors, _notes(metadata)


def not_finite(tensors: Tensors) -> list[str]:
    """The keys of tensors that hold values that are not finite; a sum that is finite has no other terms."""
    floating = ((key, t) for key, t in tensors.items() if t.is_floating_point())
    return [key for key, t in floating if not math.isfinite(t.float().sum()) and not torch.isfinite(t).all()]


def renamed() -> dict[str, str]:
    """Today's names of attributes that methods' older files call otherwise."""
    return {old: new for config in METHODS.values() for old, new in config.renamed.items()}


def _todays(key: str, names: Mapping[str, str]) -> str:
    path, dot, attribute = key.rpartition(".")
    return path + dot + names.get(attribute, attribute)


def _notes(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        notes = json.loads(metadata.get("veneer", "{}"))
    except (json.JSONDecodeError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) and isinstance(notes.get("base", {}), dict) else {}


def check(state: State, name: str, tensors: Tensors) -> None:
    """Raise CheckpointError unless `tensors` are exactly those of the adapter, in key and shape."""
    expected = slots(state, name)
    copies = {k: whose for k, whose in repeats(state, name).items() if k in tensors and whose in tensors}
    extra = {k for k in tensors if is_base_embedding(k)} | copies.keys()
    missing = [k for k in expected if k not in tensors]
    unlike = [k for k, whose in copies.items() if not _repeats(tensors[k], tensors[whose])]
    unexpected = [k for k in tensors if k not in expected and k not in extra]
    shapes = [
        f"{k}: {tuple(tensors[k].shape)} in the file, {tuple(t.shape)} in the model"
        for k, t in expected.items()
        if k in tensors and tensors[k].shape != t.shape
    ]
    kinds = [
        f"{k}: {tensors[k].dtype} in the file"
        for k, t in expected.items()
        if k in tensors and tensors[k].is_floating_point() != t.is_floating_point()
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of another kind": kinds}
    problems |= {"unlike those they should repeat": unlike}
    found = [f"{len(keys)} {how}:{listing(keys)}" for how, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"the file does not fit adapter {name!r} on this model; tensors " + "\nand ".join(found))


def _repeats(t: Tensor, first: Tensor) -> bool:
    """They are the same numbers; a tied module may see its weight from the other side."""
    return torch.equal(t, first) or (first.dim() == 2 and torch.equal(t, first.T))


def absorb(state: State, name: str, tensors: Tensors) -> None:
    """Put checked tensors into the adapter."""
    for prefix, part in parts(state, name):
        own = {key: tensors[prefix + key] for key in export(part) if prefix + key in tensors}
        if hasattr(part, "absorb"):
            part.absorb(own)
        else:
            part.load_state_dict(own, strict=False, assign=any(t.is_meta for t in part.state_dict().values()))


def is_base_embedding(key: str) -> bool:
    path = key.removesuffix(".weight").removesuffix(".base_layer")
    return key.endswith(".weight") and path.rpartition(".")[2] in EMBEDDING_NAMES and path != key


def absorb_base_embeddings(embeddings: Iterable[tuple[Any, Tensor]]) -> None:
    """Base embeddings that came in the file (the vocabulary was resized) take the place of the model's."""
    for module, tensor in embeddings:
        if not torch.equal(module.weight.detach().cpu(), tensor.to(module.weight.dtype)):
            with torch.no_grad():
                module.weight.copy_(tensor)


def base_embeddings_in(
    model: nn.Module, state: State, name: str, tensors: Tensors
) -> Iterator[tuple[nn.Module, Tensor]]:
    """(module, weight) of the base embeddings that came in the file.

    Raises:
        CheckpointError: the model has no such module, or its vocabulary has another size.
    """
    found = {key: tensor for key, tensor in tensors.items() if is_base_embedding(key)}
    modules, own = (dict(walk(model)), slots(state, name)) if found else ({}, {})
    for key, tensor in found.items():
        path = key.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer")
        if key in own:
            continue
        module = modules.get(path)
        if module is None:
            raise CheckpointError(f"the file holds {key!r}, but the model has no module {path!r}")
        if module.weight.shape != tensor.shape:
            raise CheckpointError(
                f"the adapter was saved with {path!r} of {tuple(tensor.shape)}, the model has "
                f"{tuple(module.weight.shape)}; call model.resize_token_embeddings({tensor.shape[0]}) first"
            )
        yield module, tensor


# The base model


def base_weights(model: Any, state: State, name: str) -> dict[str, Tensor]:
    """Pretrained weights an adapter stands on, by path; under a prompt the input embedding, by "".

    Without those that are not whole in memory.
    """
    found = {p: _pretrained(state, p) for p, a in state.adapters(name).items() if not isinstance(a, Replace)}
    found |= {"": model.get_input_embeddings().weight} if name in state.prompts else {}
    whole = {path: W for path, W in found.items() if W is not None}
    return {path: W for path, W in whole.items() if not W.is_meta and not hasattr(W, "full_tensor")}


def _pretrained(state: State, path: str) -> Tensor | None:
    """The pretrained weight of a layer; of a block, which has none of its own, that of the first matrix inside."""
    layer = state.layers[path]
    if layer.target.kind != "block":
        return layer.target.original_weight()
    for below, module in walk(layer.base_layer, path):
        if kind_of(module).kind == "linear":
            return state.layers[below].target.original_weight() if below in state.layers else module.weight
    return None


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """A few of the pretrained weights, to recognise the base model by."""
    return {path: _sample(weights[path]) for path in list(weights)[:: max(1, len(weights) // 16)][:16]}


def check_base(weights: Mapping[str, Tensor], noted: Mapping[str, Any]) -> None:
    """Raise BaseMismatch when the noted weights are not those of this model."""
    noted = {
        path: values
        for path, values in noted.items()
        if path in weights and isinstance(values, list) and all(isinstance(v, float) for v in values)
    }
    if not noted:
        return
    here = torch.tensor([v for path in noted for v in _sample(weights[path])])
    there = torch.tensor([v for values in noted.values() for v in values])
    if here.shape != there.shape:
        raise BaseMismatch("the file's notes on its base model do not fit this model's layers")
    difference = float((here - there).norm() / there.norm().clamp_min(1e-12))
    if difference > 0.05:
        raise BaseMismatch(
            f"the adapter was trained on another base model: {len(noted)} of its layers, sampled, differ by "
            f"{difference:.0%} from the weights here. Load the base it was trained on, or pass check_base=False"
        )


def _sample(W: Tensor) -> list[float]:
    """Four values spread over a weight, rounded as bf16 would."""
    where = [torch.linspace(0, size - 1, 4, device=W.device).long() for size in W.shape]
    return W.detach()[tuple(where)].to(torch.bfloat16).tolist()
