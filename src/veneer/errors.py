"""The errors that veneer raises for invalid requests. All are `ValueError`s."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from difflib import SequenceMatcher

PACKAGE = __name__.partition(".")[0]
SIMILAR = 0.5
"""The least similarity, from 0 to 1, of a name that an error suggests."""


class VeneerError(ValueError):
    """A request that cannot be carried out; the message says what was asked, what was found and what to do."""


class ConfigError(VeneerError):
    """A field of a config is unknown, of the wrong type, or contradicts another."""


class TargetError(VeneerError):
    """An entry of a targeting field matches nothing, or a module that the method cannot adapt."""


class CheckpointError(VeneerError):
    """A saved adapter is missing, damaged, or does not fit the model."""


class NotResumable(CheckpointError):
    """A saved adapter only holds a result of the trained parameters, so training cannot be resumed from it."""

    @classmethod
    def because(cls, held: str, lost: str, instead: str) -> NotResumable:
        """The error for a file that holds only `held`, without `lost`; training with `instead` avoids it."""
        return cls(
            f"the file holds only {held}, from which {lost} cannot be recovered: load it with is_trainable=False, "
            f"or train with {instead} to be able to resume"
        )


class BaseMismatch(CheckpointError):
    """The adapter was trained on another base model."""


class DataError(VeneerError):
    """Training data is missing, damaged, or has no columns that can be trained on."""


class TrainingError(VeneerError):
    """A run cannot start or continue, or its result is unusable: a loss is not finite, or the adapter is unchanged."""


class RoundingWarning(UserWarning):
    """Merging into quantised weights lost much of the update."""


class NotMergeable(VeneerError):
    """The adapter cannot be expressed as a new weight, or merging it would change the output."""


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """The candidates most similar to `name`, as `"; nearest: a, b"`; empty if none is similar."""
    close = similar(name, candidates)[:n]
    return f"; nearest: {', '.join(close)}" if close else ""


def similar(name: str, candidates: Iterable[str]) -> list[str]:
    """The candidates that are similar to `name`, the most similar first."""
    if len(name) > 200:  # no name is this long, and the time of a comparison grows with the square of the length
        return []
    scores = {candidate: _likeness(name.lower(), candidate.lower()) for candidate in candidates}
    close = [candidate for candidate, score in scores.items() if score >= SIMILAR]
    return sorted(close, key=lambda candidate: -scores[candidate])


def _likeness(name: str, candidate: str) -> float:
    """How similar two names are, from 0 to 1, also where letters are exchanged or the end is left out."""
    order = SequenceMatcher(None, name, candidate).ratio()
    beginning = SequenceMatcher(None, name, candidate[: len(name) + 1]).ratio()
    if len(name) >= 3 and beginning >= 0.8:
        order = max(order, 0.8 * beginning)
    if order < SIMILAR:
        return order
    letters = SequenceMatcher(None, sorted(name), sorted(candidate)).ratio()
    return max(order, (order + letters) / 2)


def listing(items: Iterable[str], most: int = 8) -> str:
    """The items, one per line and at most `most` of them, for the end of an error message."""
    items = list(items)
    lines = [f"\n  {printable(item)}" for item in items[:most]]
    return "".join(lines) + (f"\n  ... and {len(items) - most} more" if len(items) > most else "")


def counted(count: int, noun: str) -> str:
    """A number and its noun: 1 row, 1,200 rows."""
    plural = "" if count == 1 else "s"
    return f"{count:,} {noun}{plural}"


def printable(text: str, most: int = 300) -> str:
    """Text from a file made safe for a terminal: control characters are escaped, and it is cut after `most`."""
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text[:most]
    )
    return escaped if len(text) <= most else f"{escaped}..."


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of something in the user's code: the warning shows the line that called veneer."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{PACKAGE}."):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the hints and tracebacks that libraries add."""
    return str(error).strip().partition("\n")[0]
