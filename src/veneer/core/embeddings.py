"""Base embeddings in an adapter's file: PEFT saves the whole embedding or head if `target_modules` lists its name.

These weights belong to the base model, and all adapters on it share them. In the file they may differ from the
pretrained ones, for example because the vocabulary was resized.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.pretrained import vocabulary_size
from ..files.read import PREFIX
from ..targets.walk import walk
from .adapter import Replace, Tensors
from .config import Config
from .state import State

if TYPE_CHECKING:
    from .layer import AdapterLayer

NAMES = ("embed_tokens", "lm_head")
"""Names of the modules that PEFT saves in full if `target_modules` lists them."""
OTHER_NAMES = ("wte", "word_embeddings", "embed_in", "embed_out", "embeddings", "shared", "output_layer")
"""Further names of embeddings and heads, which are saved if the vocabulary was resized."""


class Embedding(NamedTuple):
    """An embedding or head, and a value for its weight."""

    module: Any
    weight: Tensor


def to_save(model: Any, state: State, config: Config, wanted: bool | None) -> Tensors:
    """The base embeddings to save with an adapter, by key.

    Args:
        wanted: whether to save them; None: follow PEFT's rule.
    """
    names = _names_to_save(config, wanted)
    is_whole = wanted or (wanted is None and is_resized(model, config))
    whole = of_model(model) if is_whole and config.file_holds_embedding else []
    copied = {id(layer.base_layer) for layer in state.layers.values() if _is_copied(layer)}
    tensors: Tensors = {}
    for path, module in walk(model):
        weight = getattr(module, "weight", None)
        is_wanted = path.rpartition(".")[2] in names or any(part is module for part in whole)
        if is_wanted and isinstance(weight, Tensor) and id(module) not in copied:
            infix = "base_layer." if path in state.layers else ""
            tensors[f"{PREFIX}{path}.{infix}weight"] = weight
    return tensors


def is_resized(model: Any, config: Config) -> bool:
    """Whether the model's vocabulary has another size than that of its pretrained config, if this is here.

    PEFT then saves the embeddings too, because the rows of new tokens are nowhere else.
    """
    if not hasattr(model, "get_input_embeddings") or not hasattr(getattr(model, "config", None), "get_text_config"):
        return False
    before = vocabulary_size(config.base_model_name_or_path, config.revision)
    now = getattr(model.config.get_text_config(), "vocab_size", None)
    return before is not None and now is not None and before != now


def _is_copied(layer: AdapterLayer) -> bool:
    """Whether a whole copy of the module is saved (`modules_to_save`)."""
    parts: list[Any] = []
    for adapter in layer.adapters.values():
        parts += adapter.parts  # type: ignore[arg-type, operator]
    return any(isinstance(part, Replace) for part in parts)


def _base(module: Any) -> Any:
    return getattr(module, "base_layer", module)


def _names_to_save(config: Config, wanted: bool | None) -> tuple[str, ...]:
    if not config.file_holds_embedding or wanted is False:
        return ()
    targets = getattr(config, "target_modules", None)
    targeted = tuple(name for name in NAMES if isinstance(targets, list) and name in targets)
    if wanted or (targeted and config.ties()):
        return NAMES
    return targeted


def is_one(key: str) -> bool:
    """Whether a key in a file belongs to a base embedding or head."""
    path = path_of(key)
    return key.endswith(".weight") and path.rpartition(".")[2] in (*NAMES, *OTHER_NAMES) and path != key


def path_of(key: str) -> str:
    """The path of the module that the key of a base embedding belongs to."""
    return key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")


def of_model(model: Any) -> list[Any]:
    """A model's input embedding and its head, without the layers around them."""
    if not hasattr(model, "get_input_embeddings"):
        return []
    return [_base(model.get_input_embeddings()), _base(model.get_output_embeddings())]


def among(tensors: Tensors, model: nn.Module, slots: Collection[str], others: Iterable[str]) -> list[Embedding]:
    """The base embeddings in a file that differ from the model's.

    Args:
        slots: the keys of the adapter's own tensors, which are skipped.
        others: the names of the model's other adapters, which were trained with the model's embeddings.

    Raises:
        CheckpointError: the model lacks the module, has a vocabulary of another size, or has other adapters.
    """
    modules = dict(walk(model))
    changed = []
    for key, tensor in tensors.items():
        if key in slots or not is_one(key):
            continue
        path = path_of(key)
        module = modules.get(path)
        if module is None:
            raise CheckpointError(f"the file holds {key!r}, but the model has no module {path!r}")
        if path.rpartition(".")[2] not in NAMES and not any(part is module for part in of_model(model)):
            raise CheckpointError(
                f"the file holds {key!r}, which is neither the adapter's nor an embedding of the model"
            )
        if module.weight.shape != tensor.shape:
            raise CheckpointError(
                f"{path!r} has the shape {tuple(tensor.shape)} in the file and {tuple(module.weight.shape)} in the "
                f"model; call model.resize_token_embeddings({tensor.shape[0]}) before loading the adapter"
            )
        if not torch.equal(module.weight.detach().cpu(), tensor.to(module.weight.dtype)):
            _check_no_others(path, list(others))
            changed.append(Embedding(module, tensor))
    return changed


def _check_no_others(path: str, others: list[str]) -> None:
    if others:
        names = ", ".join(map(repr, others))
        raise CheckpointError(
            f"the {path!r} in the file differs from the model's, which {names} is trained on, and all adapters share "
            "the base model's weights. Load this adapter onto a separate copy of the base model"
        )


class Brought:
    """Sets base embeddings to those from an adapter's file; `undo` restores the model's own."""

    def __init__(self, embeddings: list[Embedding]) -> None:
        self.before = [Embedding(module, module.weight.detach().clone()) for module, _ in embeddings]
        _write(embeddings)

    def undo(self) -> None:
        _write(self.before)


@torch.no_grad()
def _write(embeddings: list[Embedding]) -> None:
    """Copy the values in place, so that tied weights stay tied."""
    for module, weight in embeddings:
        module.weight.copy_(weight)
