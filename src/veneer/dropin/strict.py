"""The setting of the drop-in: whether to raise an error, or only warn, for what PEFT accepts and veneer refuses."""

from __future__ import annotations

import warnings

_refuses = [False]


def set_strict(strict: bool) -> None:
    _refuses[0] = strict


def is_strict() -> bool:
    return _refuses[0]


def settle(error: Exception, category: type[Warning] = UserWarning) -> None:
    """Raise `error` if the drop-in is strict, else warn with its message."""
    if is_strict():
        raise error
    warnings.warn(str(error), category, stacklevel=3)
