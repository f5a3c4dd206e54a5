"""An adapter as a LoRA in GGUF, which llama.cpp loads with `--lora`.

A LoRA is taken from its files, bit for bit. Another method becomes the LoRA that is nearest to its update: an exact one
if the method has factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import embeddings
from ..core.config import Config
from ..errors import CheckpointError, ConfigError, NotMergeable, listing
from ..files.find import find_weights
from ..files.gguf import metadata as headers
from ..files.gguf.file import Planned, Progress, type_of, write
from ..files.gguf.tensors import Naming
from ..files.pull import resolve
from ..files.read import PREFIX, tensor_shapes
from ..files.skeleton import skeleton
from ..formats import peft
from ..formats.lora import Hints, Pair
from ..model.catalogue import page_of
from ..model.to_lora import adapter_state, update_of
from .as_lora import Nearest
from .exported import Export
from .merge import base_of, on_files
from .shards import INDEX, SINGLE

if TYPE_CHECKING:
    import numpy as np

ALORA = "alora_invocation_tokens"


def export_adapter(
    source: str, out: Path, model: str | None, dtype: str, rank: int | None, check_base: bool, progress: Progress
) -> Export:
    """Write an adapter as a LoRA in GGUF; see `export`."""
    config = Config.from_pretrained(source)
    base = base_of([config], model)
    bare = skeleton(base)
    naming = Naming(bare.config)
    _check_head(_adapted_paths(source), bare)
    if rank is None and peft.is_plain(config, (ALORA,)):
        pairs, lost = from_file(source, base, check_base), 0.0
    else:
        pairs, lost = _from_base(source, config, base, rank, check_base, progress)
    _check_places(pairs, bare)
    alpha, scaled = _one_alpha(pairs)
    name = Path(source).name
    metadata = headers.of_adapter(name, base, alpha)
    tokens = getattr(config, ALORA, None)
    if tokens:
        metadata["adapter.alora.invocation_tokens"] = _unsigned(tokens)
    tensors = list(_planned_pairs(scaled, naming, dtype))
    size = write(out, naming.architecture.name, dtype, metadata, tensors)
    highest = max(pair.r for pair in pairs.values())
    result = Export(str(out), "adapter", base, naming.architecture.name, dtype, len(tensors), size, highest, lost)
    if tokens:
        result.notes.append("aLoRA: llama-server switches the adapter on at its invocation tokens; llama-cli does not")
    return result


def from_file(source: str, base: str, check_base: bool) -> dict[str, Pair]:
    """The pairs of a LoRA, bit for bit; its base is checked if the weights are on this machine."""
    directory = Path(source)
    if not directory.is_dir():
        directory = find_weights(source).parent
    shapes = tensor_shapes(find_weights(source))
    _refuse_parts(shapes)
    pairs = peft.read(directory, Hints(), (ALORA,)).check(directory).pairs
    home = Path(resolve(base))
    has_weights = any((home / name).is_file() for name in (SINGLE, INDEX))
    if check_base and has_weights:
        on_files([source], base)
    return pairs


def _adapted_paths(source: str) -> set[str]:
    """Paths of the modules that an adapter's file names."""
    paths = set()
    for key in tensor_shapes(find_weights(source)):
        path, found, _ = key.removeprefix(PREFIX).partition(".lora_")
        if found:
            paths.add(path)
    return paths


def _refuse_parts(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ConfigError if a file holds more than updates of linear layers."""
    others = [key for key in shapes if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise ConfigError(
            "only adapters of linear layers can be exported; merge this one into the whole model (--to gguf --merged, "
            "or `veneer merge`). The file also holds:"
            f"{listing(others)}"
        )


def _from_base(
    source: str, config: Config, base: str, rank: int | None, check_base: bool, progress: Progress
) -> tuple[dict[str, Pair], float]:
    """(the LoRA nearest to an adapter's update by module, |what it lacks| / |update|)."""
    if not page_of(config).mergeable:
        raise NotMergeable(f"{config.peft_type} has no form as an update of weights, so it has none in GGUF either")
    if getattr(config, ALORA, None):
        raise NotMergeable("aLoRA is exported with its own A and B only: without --rank, and without other variants")
    try:
        return _reduced(source, base, rank, check_base, progress)
    except NotMergeable as error:
        raise NotMergeable(f"{error}; --merged writes the whole model instead") from None


@torch.no_grad()
def _reduced(
    source: str, base: str, rank: int | None, check_base: bool, progress: Progress
) -> tuple[dict[str, Pair], float]:
    opened = on_files([source], base, check_base)
    name = next(iter(opened.model.peft_config))
    state = adapter_state(opened.model, name)
    if any(embeddings.is_one(key) for key in tensor_shapes(find_weights(source))):
        raise NotMergeable("the adapter was saved with new embeddings, which a LoRA does not hold")
    nearest = Nearest()
    layers = [layer for layer in state.layers.values() if name in layer.adapters]
    for done, layer in enumerate(layers, 1):
        update = update_of(layer, name)
        if update is None or layer.target.kind != "linear":
            raise NotMergeable(f"{layer.path!r} is trained otherwise than by an update of a linear layer")
        nearest.add(layer.path, update, rank)
        progress(done, len(layers))
    return nearest.pairs, nearest.lost


def _check_places(pairs: dict[str, Pair], model: Any) -> None:
    """Raise unless each pair fits a linear layer of the base model."""
    problems = []
    modules = dict(model.named_modules())
    for path, pair in pairs.items():
        module = modules.get(path)
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            problems.append(f"{path}: no such layer")
            continue
        is_transposed = type(module).__name__ == "Conv1D"
        shape = tuple(reversed(weight.shape)) if is_transposed else tuple(weight.shape)
        given = (pair.B.shape[0], pair.A.shape[1])
        if given != shape:
            problems.append(f"{path}: the update is {given}, the weight {shape}")
    if problems:
        raise CheckpointError(f"the adapter does not fit the base model:{listing(problems)}")


def _check_head(paths: Iterable[str], model: Any) -> None:
    """Raise ConfigError if the head is adapted, but tied to the embedding."""
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    modules = dict(model.named_modules())
    if is_tied and any(modules.get(path) is head for path in paths):
        raise ConfigError(
            "the base model ties its head to its embedding, and llama.cpp has no separate head to adapt; write the "
            "whole model with --merged"
        )


def _one_alpha(pairs: dict[str, Pair]) -> tuple[float, dict[str, Pair]]:
    """(the alpha of the file, the pairs with it): llama.cpp has one alpha and scales by alpha / rank.

    alpha is 0 in no file, because llama.cpp then does not scale at all. A pair with another alpha has it in its B.
    """
    alphas = [pair.alpha for pair in pairs.values() if pair.alpha]
    alpha = alphas[0] if alphas else 1.0
    scaled = {}
    for path, pair in pairs.items():
        if pair.alpha != alpha:
            pair = Pair(pair.A, pair.B.float() * (pair.alpha / alpha), alpha)
        scaled[path] = pair
    return alpha, scaled


def _planned_pairs(pairs: dict[str, Pair], naming: Naming, dtype: str) -> Iterator[Planned]:
    """The tensors of an adapter: a (r, in) and b (out, r) of each module."""
    for path, pair in pairs.items():
        name = naming.of(f"{path}.weight")
        B = naming.interleaved(f"{path}.weight", pair.B)
        for ending, value in (("lora_a", pair.A), ("lora_b", B)):
            key = f"{name}.{ending}"
            type_ = type_of(key, value.shape, dtype, "")
            yield Planned(key, tuple(value.shape), type_, partial(_same, value))


def _same(value: Tensor) -> Tensor:
    return value


def _unsigned(numbers: list[int]) -> np.ndarray:
    import numpy as np

    return np.array(numbers, dtype=np.uint32)
