"""What `look` found, in words: the lines of its table, and remarks on what may be wrong with the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from ..errors import counted

MOST_CLASSES = 12
"""Classes that are named with their number of rows."""


def table_rows(parts: Sequence[dict[str, Any]], max_length: int) -> Iterator[tuple[str, list[str]]]:
    """(name, a cell for each part) for each line of the table."""

    def cells(key: str) -> list[str]:
        return [f"{part[key]:,}" for part in parts]

    yield "rows", cells("rows")
    yield "rows that are used", cells("kept")
    yield "tokens", cells("tokens")
    yield "tokens that are learned", cells("learned_tokens")
    for name, key in (("shortest", "min"), ("median", "median"), ("95% are within", "p95"), ("longest", "max")):
        yield name, [f"{part['lengths'][key]:,}" if part["lengths"] else "-" for part in parts]
    yield f"cut at {max_length:,} tokens", cells("cut_rows")
    yield "dropped, too long", cells("too_long_rows")
    yield "dropped, nothing learned", cells("unlearned_rows")
    yield "duplicates", [f"{part['duplicates']['rows']:,}" for part in parts]


def remarks(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(colour, line) for what may be wrong with the data, from the content of the JSON."""
    for name in ("train", "evaluation"):
        part = content[name]
        if part is None:
            continue
        of = "" if name == "train" else " of the evaluation data"
        for error, note in part["refused"].items():
            yield "red", f"training would stop at {counted(note['rows'], 'row')}{of}{_places(note['places'])}: {error}"
        for what, note in part["odd"].items():
            verb = "has" if note["rows"] == 1 else "have"
            yield "yellow", f"{counted(note['rows'], 'row')}{of} {verb} {what}{_places(note['places'])}"
        repeated = part["duplicates"]
        if repeated["rows"]:
            verb = "repeats" if repeated["rows"] == 1 else "repeat"
            yield "yellow", f"{counted(repeated['rows'], 'row')}{of} {verb} an earlier row{_places(repeated['places'])}"
        if not part["is_whole"]:
            yield "yellow", f"only the first {part['rows']:,} rows{of} were read; --limit reads more"
        if part["classes"]:
            yield "", f"classes{of}: {_classes(part['classes'])}"
    if content["also_in_training"]:
        place = content["first_also_in_training"]
        count = counted(content["also_in_training"], "row")
        verb = "is" if content["also_in_training"] == 1 else "are"
        yield "red", f"{count} of the evaluation data {verb} also trained on (the first: {place})"


def _classes(counts: dict[str, int]) -> str:
    """The largest classes with their numbers of rows."""
    texts = [f"{label} {count:,}" for label, count in counts.items()]
    more = len(texts) - MOST_CLASSES
    rest = f" and {more:,} more" if more > 0 else ""
    return ", ".join(texts[:MOST_CLASSES]) + rest


def _places(places: Sequence[str]) -> str:
    """The places of some rows in brackets; a file is named once: (rows.jsonl:3, 7)."""
    texts = []
    for file, group in groupby(places, key=lambda place: place.rpartition(":")[0]):
        numbers = [place.rpartition(":")[2] for place in group]
        texts.append(f"{file}:{', '.join(numbers)}")
    return f" ({'; '.join(texts)})" if texts else ""
