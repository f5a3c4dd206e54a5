"""Adapters trained in stages, on a base model into which an earlier adapter is merged.

The directory of such an adapter holds the earlier one in its folder `start`, so the directory that the training started
from is not needed. Its file records a digest of every earlier adapter. To load it, the earlier adapters are merged into
the base model again, in memory, as they were for the training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ..core import checkpoint, provenance
from ..core.config import CONFIG_NAME, Config
from ..errors import CheckpointError, NotMergeable
from ..files.find import find_file, find_weights
from ..files.read import WEIGHTS_NAME
from .peft_model import PeftModel
from .schedule import follow

START = "start"
"""The folder of the earlier adapter in an adapter's directory."""


def digest(adapter: str | Path, **hub: Any) -> str:
    """A digest of an adapter's tensors and settings."""
    content = find_weights(adapter, **hub).read_bytes()
    settings = provenance.settings(Config.from_pretrained(adapter, **hub))
    return hashlib.sha256(content + json.dumps(settings, sort_keys=True).encode()).hexdigest()


def merged_below(adapter: str | Path, **hub: Any) -> list[str]:
    """The digests of the adapters that were merged into an adapter's base model for its training, innermost first."""
    return checkpoint.read_notes(adapter, **hub).get("preparation", {}).get(provenance.MERGED, [])


def with_earlier(base: Any, adapter: str | Path, **hub: Any) -> Any:
    """A base model as an adapter was trained on it: with all earlier adapters merged in. `base` is changed.

    Raises:
        CheckpointError: an earlier adapter is missing, or is another one.
    """
    wanted = merged_below(adapter, **hub)
    if not wanted:
        return base
    below = earlier(adapter, **hub)
    find_file(adapter, CONFIG_NAME, **below)
    base = with_adapter(base, adapter, **below)
    if provenance.preparation(base).get(provenance.MERGED) != wanted:
        raise CheckpointError(
            f"the folder {START!r} of {str(adapter)!r} holds another adapter than the one that was merged into the "
            "base model for its training; restore it"
        )
    return base


def with_adapter(base: Any, adapter: str | Path, **hub: Any) -> Any:
    """A base model with an adapter merged in, and with those on which that was trained. `base` is changed.

    Raises:
        NotMergeable: the method has no form as a weight, or the base model is quantised.
    """
    base = with_earlier(base, adapter, **hub)
    below = provenance.preparation(base).get(provenance.MERGED, [])
    model = PeftModel.from_pretrained(base, adapter, **hub)
    if checkpoint.is_rounded(model._state, "default"):
        raise NotMergeable(
            f"{str(adapter)!r} would be merged into quantised weights, which loses most of it to rounding; train it "
            "on (start_mode: continue), or train without quantise"
        )
    try:
        merged = model.merge_and_unload()
    except NotMergeable as error:
        raise NotMergeable(
            f"{str(adapter)!r} cannot be merged into its base model: {error}; train it on instead (start_mode: "
            "continue)"
        ) from None
    provenance.prepare(merged, **{provenance.MERGED: [*below, digest(adapter, **hub)]})
    return merged


def earlier(adapter: str | Path, **hub: Any) -> dict[str, Any]:
    """The arguments that find the earlier adapter in the directory or repository of an adapter."""
    inside = Path(hub.get("subfolder") or "") / START
    return {**hub, "subfolder": inside.as_posix()}


def keep_earlier(adapter: str | Path, directory: Path, *, merged: bool) -> None:
    """Copy what an adapter's training starts from into its directory.

    Args:
        adapter: the directory or hub id of the adapter that is trained on or merged.
        directory: the directory of the new adapter.
        merged: whether that adapter is merged into the base model, and not only those below it.
    """
    depth = len(merged_below(adapter))
    target = directory / START
    hub: dict[str, Any] = {}
    if merged:
        _copy(adapter, target, hub)
        target /= START
    for _ in range(depth):
        hub = earlier(adapter, **hub)
        _copy(adapter, target, hub)
        target /= START


def _copy(adapter: str | Path, directory: Path, hub: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copyfile(find_file(adapter, name, **hub), directory / name)


def start_again_(model: PeftModel, name: str = "default") -> None:
    """Start the schedule of an adapter's method from its first step, if it has one."""
    model._state.schedules.pop(name, None)
    follow(model._state, name)
