"""Rows from files, directories and the hub, one dict a row, exactly as they stand there.

JSON, CSV and Parquet are read row by row rather than through Arrow tables as `datasets` does: those give every row the
keys of all others (a tool call's arguments grow nulls), and turn a CSV's "007" into 7.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import DataError, nearest

Row = dict[str, Any]
OTHER_SPLITS = ("test", "valid", "val", "dev", "eval")
SAVED = ("dataset_info.json", "dataset_dict.json")


def rows(source: Source, streaming: bool = False) -> Iterator[tuple[str, Row]]:
    """(place, row) of a source, its columns under veneer's names.

    Raises:
        DataError: there is no such data, or a row cannot be read; names the file and the line.
    """
    for place, row in _raw(source, streaming):
        yield place, _renamed(place, row, source.columns)


def _raw(source: Source, streaming: bool) -> Iterator[tuple[str, Row]]:
    path = Path(source.path)
    if path.is_file():
        yield from _read(path)
    elif path.is_dir() and any((path / name).is_file() for name in SAVED):
        yield from _from_disk(path, source.split)
    elif path.is_dir():
        for file in files_of(path, source.split):
            yield from _read(file)
    elif path.is_absolute() or path.suffix in READERS or source.path.startswith(".") or source.path.count("/") > 1:
        raise DataError(f"there is no data file {source.path!r}{_near(path)}")
    else:
        yield from _from_hub(source.path, source.split, streaming)


def files_of(directory: Path, split: str) -> list[Path]:
    """The data files of a split: those whose names begin with it, or all of a directory that has no splits.

    Raises:
        DataError: there are none.
    """
    files = sorted(p for p in directory.iterdir() if p.suffix.lower() in READERS)
    own = [p for p in files if p.stem.lower().startswith(split.lower())]
    if own:
        return own
    if not files or split != "train" or any(p.stem.lower().startswith(OTHER_SPLITS) for p in files):
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
        raise DataError(f"{str(directory)!r} has no data files of the split {split!r}; it holds {found}")
    return files


def _read(path: Path) -> Iterator[tuple[str, Row]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{str(path)!r}: data files end in {', '.join(READERS)}, not {path.suffix!r}")
    try:
        for number, row in reader(path):
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} holds a {type(row).__name__}, not an object with columns")
            yield f"{path}:{number}", row
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse(path, number, line)


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}:{number} is not JSON: {error}") from None


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """A list of rows, or an object that holds one list."""
    content = _parse(path, 1, path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise DataError(f"{str(path)!r} holds neither a list of rows nor an object with one; is it .jsonl?")
    yield from enumerate(content, 1)


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise DataError(f"{path}:{reader.line_num} has another number of columns than the heading ({columns})")
            yield reader.line_num, row


def _tsv(path: Path) -> Iterator[tuple[int, Any]]:
    return _csv(path, "\t")


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{str(path)!r} is no Parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches(1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def _from_disk(path: Path, split: str) -> Iterator[tuple[str, Row]]:
    """What `Dataset.save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        if split not in found:
            raise DataError(f"{str(path)!r} has no split {split!r}; it has {', '.join(found)}")
        found = found[split]
    for number, row in enumerate(found, 1):
        yield f"{path}:{number}", dict(row)


def _from_hub(name: str, split: str, streaming: bool) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    try:
        found = load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{name!r} is no file or directory, and could not be had from the hub: {reason}") from error
    for number, row in enumerate(found, 1):
        yield f"{name}:{number}", dict(row)


def _near(path: Path) -> str:
    return nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _renamed(place: str, row: Row, columns: dict[str, str]) -> Row:
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(f"{place} has no column {theirs!r} to be the {ours}{nearest(theirs, row)}")
    kept = {name: value for name, value in row.items() if name not in columns.values() and name not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


class Strict(BaseModel):
    """Unknown keys are errors, and the string below a field is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Source(Strict):
    """Where rows come from."""

    path: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet), a directory of such files, or a hub id."""
    weight: float = Field(1.0, gt=0)
    """How often each row is seen in an epoch; 0.5 takes a random half. When streaming: the share of the rows drawn."""
    columns: dict[str, str] = {}
    """Other names of columns: what veneer calls it (prompt, answer, text ...), then what the data calls it."""
    split: str = "train"
    """Which split of a directory or a hub id."""
