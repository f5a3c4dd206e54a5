"""What training continues from and an adapter's file has no place for, in a file beside it.

The file of a projected prefix, say, holds the prefix but not the projection that is trained, and no file holds the
averages by which AdaLoRA chooses ranks. Both are in `adapter_training.safetensors`, which nothing but training reads.
A module that is saved may have two methods: `remainder()` returns such tensors by attribute name, and `absorb` takes
them together with those of `export()`. A schedule has `export()` and `absorb(tensors)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..files.find import find_file
from ..files.read import read_tensors
from ..files.write import replacing, write_tensors
from . import checkpoint, provenance
from .adapter import Tensors
from .state import State

TRAINING_NAME = "adapter_training.safetensors"
NOTE = "training"
"""The entry of the notes in the adapter's own file that holds the checksums of the file beside it."""
SCHEDULE = "schedule."
"""The prefix of a schedule's keys."""


def slots(state: State, name: str) -> Tensors:
    """The tensors that an adapter's own file has no place for, by key."""
    tensors: Tensors = {}
    for prefix, part in checkpoint.parts(state, name):
        for key, tensor in of_part(part).items():
            tensors[prefix + key] = tensor
    for key, tensor in _of_schedule(state, name).items():
        tensors[SCHEDULE + key] = tensor
    return tensors


def of_part(part: Any) -> Tensors:
    """The tensors of one part, by attribute name."""
    return part.remainder() if hasattr(part, "remainder") else {}


def _of_schedule(state: State, name: str) -> Tensors:
    steps = getattr(state.schedules.get(name), "steps", None)
    return steps.export() if hasattr(steps, "export") else {}


def collect(state: State, name: str) -> Tensors:
    """The tensors, gathered on the CPU. In a sharded run, every process must call this."""
    memory: set[int] = set()
    return {key: checkpoint.gathered(tensor, memory) for key, tensor in slots(state, name).items()}


def write(directory: Path, tensors: Tensors) -> None:
    """Write the file beside an adapter's own; if there is nothing to write, remove that of an earlier save."""
    path = directory / TRAINING_NAME
    if not tensors:
        path.unlink(missing_ok=True)
        return
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_tensors(temporary, tensors, {"format": "pt"})


def note(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the notes of an adapter's own file say about the file beside it."""
    return {NOTE: provenance.checksums(tensors)} if tensors else {}


def read(source: str | Path, notes: Mapping[str, Any], **hub: Any) -> Tensors:
    """The tensors in the file beside an adapter's own; none if it is missing, or was written with another adapter."""
    noted = notes.get(NOTE)
    if not noted:
        return {}
    try:
        tensors, _ = read_tensors(find_file(source, TRAINING_NAME, **hub))
    except CheckpointError:
        return {}
    return tensors if provenance.checksums(tensors) == noted else {}


def check(state: State, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a tensor has another shape than the adapter's own of that key."""
    for prefix, part in checkpoint.parts(state, name):
        for key, own in of_part(part).items():
            given = tensors.get(prefix + key)
            if given is not None and given.shape != own.shape:
                raise CheckpointError(
                    f"{TRAINING_NAME} does not fit adapter {name!r}: {prefix + key} is {tuple(given.shape)}, and "
                    f"{tuple(own.shape)} in the model"
                )


def absorb_schedule(state: State, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter's schedule what it had observed."""
    steps = getattr(state.schedules.get(name), "steps", None)
    values = {}
    for key, tensor in tensors.items():
        if key.startswith(SCHEDULE):
            values[key.removeprefix(SCHEDULE)] = tensor
    if values and hasattr(steps, "absorb"):
        steps.absorb(values)
