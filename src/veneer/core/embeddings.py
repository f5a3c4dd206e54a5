"""Base embeddings in an adapter's file: PEFT writes the whole module where `target_modules` lists one of its names.

They are the base model's, changed where the vocabulary was resized: all adapters on the model share them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..targets.walk import walk
from .adapter import Tensors
from .config import Config
from .state import State

NAMES = ("embed_tokens", "lm_head")
"""PEFT's files hold the whole base module when `target_modules` lists one of these."""

Embeddings = list[tuple[nn.Module, Tensor]]


def beside(model: Any, state: State, config: Config, wanted: bool | None) -> Tensors:
    """Base embeddings that the file holds beside the adapter, by PEFT's rule or on request."""
    targets = getattr(config, "target_modules", None)
    named = [n for n in NAMES if isinstance(targets, list) and n in targets]
    if not config.file_holds_embedding or wanted is False or not (named or wanted):
        return {}
    names = NAMES if wanted or config.ties() else tuple(named)
    found: Tensors = {}
    for path, module in walk(model):
        if path.rpartition(".")[2] in names and isinstance(getattr(module, "weight", None), Tensor):
            infix = "base_layer." if path in state.layers else ""
            found[f"base_model.model.{path}.{infix}weight"] = module.weight
    return found


def is_one(key: str) -> bool:
    path = key.removesuffix(".weight").removesuffix(".base_layer")
    return key.endswith(".weight") and path.rpartition(".")[2] in NAMES and path != key


def among(tensors: Tensors, model: nn.Module, own: Collection[str], others: Iterable[str]) -> Embeddings:
    """(module, weight) of the base embeddings that came in a file and differ from the model's.

    Args:
        tensors: the file's.
        own: the keys that are the adapter's.
        others: the names of the model's other adapters, which were trained on its embeddings as they are.

    Raises:
        CheckpointError: the model has no such module, its vocabulary has another size, or others stand on it.
    """
    modules, found = dict(walk(model)), []
    for key, tensor in tensors.items():
        path = key.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer")
        if key in own or not is_one(key):
            continue
        module = modules.get(path)
        if module is None:
            raise CheckpointError(f"the file holds {key!r}, but the model has no module {path!r}")
        if module.weight.shape != tensor.shape:
            raise CheckpointError(
                f"the adapter was saved with {path!r} of {tuple(tensor.shape)}, the model has "
                f"{tuple(module.weight.shape)}; call model.resize_token_embeddings({tensor.shape[0]}) first"
            )
        if not torch.equal(module.weight.detach().cpu(), tensor.to(module.weight.dtype)):
            found.append((module, tensor))
            _check_alone(path, list(others))
    return found


def _check_alone(path: str, others: list[str]) -> None:
    if others:
        raise CheckpointError(
            f"the file holds a {path!r} other than the model's, which {', '.join(map(repr, others))} is trained on: "
            "the base model is one for all adapters. Load this adapter onto a base model of its own"
        )


class Brought:
    """Base embeddings that an adapter's file brought, and those whose place they took."""

    def __init__(self, embeddings: Embeddings) -> None:
        self.before = [(module, module.weight.detach().clone()) for module, _ in embeddings]  # type: ignore[operator]
        _fill(embeddings)

    def undo(self) -> None:
        _fill(self.before)


@torch.no_grad()
def _fill(embeddings: Embeddings) -> None:
    """In place, so that what is tied stays tied."""
    for module, tensor in embeddings:
        module.weight.copy_(tensor)  # type: ignore[operator]
