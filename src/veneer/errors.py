"""The errors veneer raises for its users. All are `ValueError`s; asserts are for ourselves."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VeneerError(ValueError):
    """Something the user asked for cannot be done; the message says what was asked, found, and what to do."""


class ConfigError(VeneerError):
    """A field of a config is unknown, of the wrong type, or contradicts another."""


class TargetError(VeneerError):
    """An entry of a targeting field matches nothing, or something the method cannot adapt."""


class CheckpointError(VeneerError):
    """An adapter on disk is missing, damaged, or does not fit the model."""


class NotResumable(CheckpointError):
    """An adapter's file holds the result of parts that it lacks, so that training cannot be resumed from it."""

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
    """Training data is missing, damaged, or of no shape that can be trained on."""


class TrainingError(VeneerError):
    """A run cannot start, go on, or be trusted: its loss is not finite, or its adapter did not change."""


class RoundingWarning(UserWarning):
    """Merging into quantised weights lost much of the update."""


class NotMergeable(VeneerError):
    """The adapter has no form as a new weight, or merging it would change the result."""


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """`"; nearest: a, b"`, or nothing when no candidate resembles `name`."""
    if len(name) > 200:  # no name is as long, and comparing takes the square of the length
        return ""
    close = get_close_matches(name, list(dict.fromkeys(candidates)), n=n, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def listing(items: Iterable[str], most: int = 8) -> str:
    """Items one to a line, cut after `most`, for the tail of an error message."""
    items = list(items)
    lines = [f"\n  {printable(item)}" for item in items[:most]]
    return "".join(lines) + (f"\n  ... and {len(items) - most} more" if len(items) > most else "")


def printable(text: str, most: int = 300) -> str:
    """Text from a file, safe for a terminal: control characters escaped, one line, not endless."""
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text[:most]
    )
    return escaped if len(text) <= most else f"{escaped}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message: libraries add hints and tracebacks below it."""
    return str(error).strip().partition("\n")[0]
