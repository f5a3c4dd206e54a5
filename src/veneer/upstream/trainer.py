"""Making transformers' `Trainer` recognise veneer models as adapter models, so that it saves and resumes adapters.

`Trainer` checks model classes through module globals, which it looks up at each call, so adding veneer's class to them
is enough. The names are the same in 5.20 to 5.24. Up to 5.22, resuming a run with several adapters silently skips the
adapter called "default"; see `_load_all`.
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
    """Add our model class to the globals of `MODULES`, now or as soon as they are imported."""
    if ours not in _amends:
        _amends[ours] = partial(_amend, ours)
    for name in MODULES:
        when_imported(name, _amends[ours])


_amends: dict[type, Any] = {}
"""One function per class, so that a module that is imported later is not amended twice."""


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
    """Make a resumed run also load the adapter in the checkpoint directory itself, which is the one called "default".

    transformers does so from 5.23 on; the same values are then loaded twice.
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
