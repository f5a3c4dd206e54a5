"""The one setting of the drop-in: does it refuse what PEFT lets pass?"""

from __future__ import annotations

import warnings

_refuses = [False]


def set_strict(strict: bool) -> None:
    _refuses[0] = strict


def is_strict() -> bool:
    return _refuses[0]


def settle(error: Exception, category: type[Warning] = UserWarning) -> None:
    """Raise `error`, or say it as a warning where PEFT goes on."""
    if is_strict():
        raise error
    warnings.warn(str(error), category, stacklevel=3)
