"""Base embeddings in an adapter's file: PEFT writes the whole module where `target_modules` lists one of its names.

They are the base model's, changed where the vocabulary was resized: all adapters on the model share them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..targets.walk import walk
from .adapter import Tensors
from .config import Config
from .state import State

NAMES = ("embed_tokens", "lm_head")
"""PEFT's files hold the whole base module when `target_modules` lists one of these."""


class Embedding(NamedTuple):
    """A value for the weight of an embedding or a head."""

    module: Any
    weight: Tensor


def to_save(model: Any, state: State, config: Config, wanted: bool | None) -> Tensors:
    """Base embeddings that a file holds in addition to the adapter.

    Args:
        wanted: save them; None: by PEFT's rule.
    """
    names = _names_to_save(config, wanted)
    tensors: Tensors = {}
    for path, module in walk(model):
        weight = getattr(module, "weight", None)
        if path.rpartition(".")[2] in names and isinstance(weight, Tensor):
            infix = "base_layer." if path in state.layers else ""
            tensors[f"base_model.model.{path}.{infix}weight"] = weight
    return tensors


def _names_to_save(config: Config, wanted: bool | None) -> tuple[str, ...]:
    if not config.file_holds_embedding or wanted is False:
        return ()
    targets = getattr(config, "target_modules", None)
    targeted = tuple(name for name in NAMES if isinstance(targets, list) and name in targets)
    if wanted or (targeted and config.ties()):
        return NAMES
    return targeted


def is_one(key: str) -> bool:
    """Whether a key of a file is that of a base embedding or head."""
    path = key.removesuffix(".weight").removesuffix(".base_layer")
    return key.endswith(".weight") and path.rpartition(".")[2] in NAMES and path != key


def among(tensors: Tensors, model: nn.Module, slots: Collection[str], others: Iterable[str]) -> list[Embedding]:
    """The base embeddings among a file's tensors that differ from the model's.

    Args:
        slots: the keys that are the adapter's own.
        others: the names of the model's other adapters, which were trained on its embeddings as they are.

    Raises:
        CheckpointError: the model has no such module, its vocabulary has another size, or there are other adapters.
    """
    modules = dict(walk(model))
    changed = []
    for key, tensor in tensors.items():
        if key in slots or not is_one(key):
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer")
        module = modules.get(path)
        if module is None:
            raise CheckpointError(f"the file holds {key!r}, but the model has no module {path!r}")
        if module.weight.shape != tensor.shape:
            raise CheckpointError(
                f"the adapter was saved with {path!r} of {tuple(tensor.shape)}, the model has "
                f"{tuple(module.weight.shape)}; call model.resize_token_embeddings({tensor.shape[0]}) first"
            )
        if not torch.equal(module.weight.detach().cpu(), tensor.to(module.weight.dtype)):
            _check_no_others(path, list(others))
            changed.append(Embedding(module, tensor))
    return changed


def _check_no_others(path: str, others: list[str]) -> None:
    if others:
        names = ", ".join(map(repr, others))
        raise CheckpointError(
            f"the file holds a {path!r} other than the model's, which {names} is trained on: the base model is one for "
            "all adapters. Load this adapter onto a base model of its own"
        )


class Brought:
    """Base embeddings that an adapter's file brought; `undo` puts the model's own back."""

    def __init__(self, embeddings: list[Embedding]) -> None:
        self.before = [Embedding(module, module.weight.detach().clone()) for module, _ in embeddings]
        _write(embeddings)

    def undo(self) -> None:
        _write(self.before)


@torch.no_grad()
def _write(embeddings: list[Embedding]) -> None:
    """In place, so that tied weights stay tied."""
    for module, weight in embeddings:
        module.weight.copy_(weight)
