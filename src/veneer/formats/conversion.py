"""Converting LoRA adapters between the file layouts of several projects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import CheckpointError, ConfigError, nearest
from ..files.write import appearing, claimed
from . import adapterhub, kohya, loralib, mlx, peft, torchtune
from .lora import Hints, Layout

MODULES = (mlx, torchtune, peft, adapterhub, kohya, loralib)
LAYOUTS: dict[str, Layout] = {module.name: cast(Layout, module) for module in MODULES}
"""Layouts by name, in the order of detection. torchtune precedes PEFT because its config can look like PEFT's."""


@dataclass(frozen=True)
class Conversion:
    """What was converted."""

    source: str
    layout: str
    """The layout of `source`."""
    out: str
    wanted: str
    """The layout of `out`."""
    modules: int
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


def layout(name: str) -> Layout:
    """The layout called `name`; raises ConfigError if there is none."""
    if name not in LAYOUTS:
        raise ConfigError(f"no layout is called {name!r}; use one of {', '.join(LAYOUTS)}{nearest(name, LAYOUTS)}")
    return LAYOUTS[name]


def detected(directory: Path) -> Layout:
    """The layout of the adapter in a directory.

    Raises:
        CheckpointError: the layout is unknown.
    """
    for candidate in LAYOUTS.values():
        if candidate.is_here(directory):
            return candidate
    if not directory.is_dir():
        content = "nothing: it does not exist"
    else:
        names = sorted(path.name for path in directory.iterdir())
        content = ", ".join(names[:8]) or "nothing"
    raise CheckpointError(
        f"{str(directory)!r} is not an adapter in any known layout ({', '.join(LAYOUTS)}); it holds {content}"
    )


def convert(
    source: str | Path, out: str | Path, to: str, from_: str | None = None, hints: Hints | None = None
) -> Conversion:
    """Write a LoRA adapter in another layout; its parameters stay the same bit for bit.

    Args:
        source: the adapter's directory.
        out: a directory that does not exist yet, or is empty.
        to: the layout to write.
        from_: the layout of `source`; None: detected.
        hints: facts that the files do not record.

    Raises:
        ConfigError: a layout cannot store the adapter, or a hint is missing.
        CheckpointError: the files are damaged, or pickles that are not allowed.
    """
    hints = hints or Hints()
    source = Path(source)
    out = Path(out)
    with claimed(out):
        writer = layout(to)
        reader = layout(from_) if from_ else detected(source)
        if not reader.is_here(source):
            raise CheckpointError(
                f"{str(source)!r} lacks the files of the layout {reader.name}; leave out --from to detect it"
            )
        lora = reader.read(source, hints).check(source)
        with appearing(out) as folder:
            writer.write(lora, folder, hints)
    count = sum(pair.A.numel() + pair.B.numel() for pair in lora.pairs.values())
    return Conversion(str(source), reader.name, str(out), to, len(lora.pairs), count)
