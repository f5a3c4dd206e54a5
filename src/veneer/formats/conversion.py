"""From one project's layout of a LoRA adapter to another's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import CheckpointError, ConfigError, nearest
from ..files.write import appearing, check_free
from . import adapterhub, kohya, loralib, mlx, peft, torchtune
from .lora import Hints, Layout

LAYOUTS: dict[str, Layout] = {
    module.name: cast(Layout, module) for module in (mlx, torchtune, peft, adapterhub, kohya, loralib)
}
"""In the order in which a directory is tried; torchtune's config may say it is PEFT's."""


@dataclass(frozen=True)
class Conversion:
    source: str
    layout: str
    out: str
    wanted: str
    modules: int
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


def layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ConfigError(f"no layout is called {name!r}; use one of {', '.join(LAYOUTS)}{nearest(name, LAYOUTS)}")
    return LAYOUTS[name]


def detected(directory: Path) -> Layout:
    """The layout of the adapter in a directory.

    Raises:
        CheckpointError: it is none that is known.
    """
    found = next((one for one in LAYOUTS.values() if one.is_here(directory)), None)
    if found is None:
        holds = (
            ", ".join(sorted(p.name for p in directory.iterdir())[:8])
            if directory.is_dir()
            else "nothing: it is not there"
        )
        raise CheckpointError(
            f"{str(directory)!r} is no adapter of {', '.join(LAYOUTS)}; it holds {holds or 'nothing'}"
        )
    return found


def convert(
    source: str | Path, out: str | Path, to: str, from_: str | None = None, hints: Hints | None = None
) -> Conversion:
    """Write the LoRA adapter in a directory in another layout, its numbers bit for bit.

    Args:
        to: the layout.
        from_: the layout of `source`; None: whichever it is.
        hints: what the files leave open.

    Raises:
        ConfigError: a layout cannot hold the adapter, or leaves something open.
        CheckpointError: the files are damaged, or pickles.
    """
    hints, source, out = hints or Hints(), Path(source), Path(out)
    check_free(out)
    writer = layout(to)
    reader = layout(from_) if from_ else detected(source)
    if not reader.is_here(source):
        raise CheckpointError(f"{str(source)!r} has not the files of {reader.name}'s layout")
    lora = reader.read(source, hints).check(source)
    with appearing(out) as folder:
        writer.write(lora, folder, hints)
    count = sum(pair.A.numel() + pair.B.numel() for pair in lora.pairs.values())
    return Conversion(str(source), reader.name, str(out), to, len(lora.pairs), count)
