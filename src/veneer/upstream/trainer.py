"""transformers' `Trainer` takes a veneer model for an adapter model: it saves and resumes as it should.

`Trainer` asks through module globals that it looks up at each call; adding our class to them is all that is needed.
The names are the same in 5.20 to 5.24. Up to 5.22 a run with several adapters that is resumed does not load the one
called "default", and says nothing; see `_load_all`.
"""

from __future__ import annotations

from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from .imports import when_imported

CONFIG_NAME = "adapter_config.json"
MODULES = ("transformers.trainer_utils", "transformers.trainer")


def recognise(ours: type) -> None:
    """Make both modules know our model class, now or when they are imported."""
    if ours not in _amends:
        _amends[ours] = partial(_amend, ours)
    for name in MODULES:
        when_imported(name, _amends[ours])


_amends: dict[type, Any] = {}
"""One function for each class, so that a module which waits to be imported is not amended twice."""


def _amend(ours: type, module: ModuleType) -> None:
    if getattr(module, "_veneer_known", False):
        return
    theirs: Any = getattr(module, "PeftModel", ())
    module.PeftModel = (*theirs, ours) if isinstance(theirs, tuple) else (theirs, ours)  # type: ignore[attr-defined]
    module.PeftMixedModel = getattr(module, "PeftMixedModel", ())  # type: ignore[attr-defined]
    module.is_peft_available = _yes  # type: ignore[attr-defined]
    module._veneer_known = True  # type: ignore[attr-defined]
    if hasattr(module, "Trainer"):
        _load_all(module.Trainer, ours)


def _load_all(trainer: Any, ours: Any) -> None:
    """Let a resumed run load the adapter in the checkpoint's own directory, too.

    transformers 5.23 does so itself; then the same values are loaded twice.
    """
    load = trainer._load_from_checkpoint

    @wraps(load)
    def load_all(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        load(self, resume_from_checkpoint, model)
        resumed = self.model if model is None else model
        has_more = isinstance(resumed, ours) and len(resumed.peft_config) > 1
        if has_more and "default" in resumed.peft_config and (Path(resume_from_checkpoint) / CONFIG_NAME).is_file():
            resumed.load_adapter(resume_from_checkpoint, "default")

    trainer._load_from_checkpoint = load_all


def _yes() -> bool:
    return True
