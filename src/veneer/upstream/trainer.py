"""transformers' `Trainer` takes a veneer model for an adapter model: it saves and resumes as it should.

`Trainer` asks through module globals that it looks up at each call; adding our class to them is all that is needed.
The names are the same in 5.20 to 5.24.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from .imports import when_imported

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


def _yes() -> bool:
    return True
