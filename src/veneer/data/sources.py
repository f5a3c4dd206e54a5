"""Read rows from files, directories and the hub, one dict per row, without changing them.

JSON, CSV and Parquet files are read row by row, not through Arrow tables as in `datasets`. Those give every row the
keys of all other rows (the arguments of a tool call get nulls), and turn a CSV's "007" into 7.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import DataError, nearest
from ..files.locate import why_no_dataset

Row = dict[str, Any]
LONGEST_CELL = 2**31 - 1
"""Characters that a cell of a CSV file may have; Python's own limit is 131,072."""
OTHER_SPLITS = ("test", "valid", "val", "dev", "eval")
"""Prefixes of the names of files that belong to a split other than train."""
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files that `Dataset.save_to_disk` writes into its directory."""


def rows(source: Source, streaming: bool = False) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for each row of a source, with columns renamed to veneer's names.

    Raises:
        DataError: the data does not exist, or a row cannot be read; names the file and the line.
    """
    for place, row in _raw(source, streaming):
        _check_text(place, row)
        yield place, _renamed(place, row, source.columns)


def _check_text(place: str, value: Any) -> None:
    """Raise DataError for text that cannot be encoded: half of a surrogate pair, as truncated JSON escapes leave it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            broken = value[error.start : error.end].encode("unicode_escape").decode()
            raise DataError(f"{place} holds {broken}, half of a character, which no tokenizer accepts") from None
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(place, name)
            _check_text(place, item)
    elif isinstance(value, list):
        for item in value:
            _check_text(place, item)


def _raw(source: Source, streaming: bool) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) with the columns as they are named in the data."""
    path = Path(source.path).expanduser()
    if path.is_file():
        yield from _read(path)
    elif _is_pattern(source.path):
        for file in _matching(path):
            yield from _read(file)
    elif path.is_dir() and any((path / name).is_file() for name in SAVED):
        yield from _from_disk(path, source.split)
    elif path.is_dir():
        for file in files_of(path, source.split):
            yield from _read(file)
    elif _looks_local(str(path)):
        raise DataError(f"there is no data file {source.path!r}{_near(path)}")
    else:
        yield from _from_hub(source.path, source.split, streaming)


def _is_pattern(name: str) -> bool:
    return any(wildcard in name for wildcard in "*?[")


def _matching(pattern: Path) -> list[Path]:
    """The data files that a pattern such as `data/train-*.parquet` matches.

    Raises:
        DataError: it matches none.
    """
    paths = [Path(name) for name in sorted(glob(str(pattern), recursive=True))]
    files = [path for path in paths if path.suffix.lower() in READERS and path.is_file()]
    if not files:
        raise DataError(f"no data file matches the pattern {str(pattern)!r}")
    return files


def _looks_local(name: str) -> bool:
    """Whether a name cannot be a hub id, so it must be a path."""
    if name.startswith(".") or name.count("/") > 1:
        return True
    path = Path(name)
    return path.is_absolute() or path.suffix in READERS


def files_of(directory: Path, split: str) -> list[Path]:
    """The data files of a split: those whose names begin with it, or all files of a directory without splits.

    The files of a dataset cloned from the hub are in its subdirectory `data`.

    Raises:
        DataError: there are none.
    """
    paths = sorted(directory.iterdir())
    files = [p for p in paths if p.suffix.lower() in READERS]
    if not files and (directory / "data").is_dir():
        return files_of(directory / "data", split)
    files_of_split = [p for p in files if p.stem.lower().startswith(split.lower())]
    if files_of_split:
        return files_of_split
    has_splits = any(p.stem.lower().startswith(OTHER_SPLITS) for p in files)
    if files and split == "train" and not has_splits:
        return files
    content = ", ".join(p.name for p in paths[:8]) or "nothing"
    raise DataError(f"{str(directory)!r} has no data files of the split {split!r}; it holds {content}")


def _read(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for each row of a file."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise DataError(f"{str(path)!r}: data files end in {known}, not {path.suffix!r}")
    try:
        for number, row in reader(path):
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} holds a {type(row).__name__}, not an object with columns")
            yield f"{path}:{number}", row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}{_way_to_utf8(path)}"
        ) from None


def _encoding(path: Path) -> str:
    """UTF-8, or UTF-16 if the file begins with its byte-order mark."""
    with open(path, "rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _way_to_utf8(path: Path) -> str:
    """How to convert a file, if its beginning can be read as GBK, the usual encoding of Chinese text besides UTF-8."""
    with open(path, "rb") as file:
        lines = file.readlines(100_000)
    try:
        text = b"".join(lines).decode("gb18030")
    except UnicodeDecodeError:
        return ""
    has_chinese = any("\u4e00" <= character <= "\u9fff" for character in text)
    if not has_chinese:
        return ""
    return f"; it reads as GBK: iconv -f GB18030 -t UTF-8 {path} > utf8{path.suffix} converts it"


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of JSON Lines, or of a JSON list under this name."""
    if _first_character(path) == "[":
        yield from _json(path)
        return
    with open(path, encoding=_encoding(path)) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse(path, number, line)


def _first_character(path: Path) -> str:
    """The first character of a text file that is not a space; "" if there is none."""
    with open(path, encoding=_encoding(path)) as file:
        for line in file:
            if line.strip():
                return line.lstrip()[0]
    return ""


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}:{number} is not JSON: {error}") from None
    except ValueError:  # Python refuses integers of several thousand digits
        raise DataError(f"{path}:{number} holds a number with too many digits to be read") from None


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON file: a list of them, or an object with exactly one list; or JSON Lines under this name."""
    text = path.read_text(encoding=_encoding(path))
    lines = text.split("\n")
    if len(lines) > 1 and _is_object(lines[0]) and _is_object(next(filter(None, lines[1:]), "")):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parse(path, number, line)
        return
    content = _parse(path, 1, text)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1:
            [content] = lists
    if not isinstance(content, list):
        raise DataError(f"{str(path)!r} holds neither a list of rows nor an object with one; is it .jsonl?")
    yield from enumerate(content, 1)


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    with open(path, encoding=_encoding(path), newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(file.readline())
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise DataError(
                    f"{path}:{reader.line_num} has a different number of columns than the heading ({columns})"
                )
            yield reader.line_num, row


def _delimiter(heading: str) -> str:
    """What separates the columns of a CSV file: what separates most names of its heading; a comma if nothing does."""
    counts = {}
    for delimiter in (",", ";", "\t"):
        names = next(csv.reader([heading], delimiter=delimiter), [])
        counts[delimiter] = len(names)
    return max(counts, key=counts.__getitem__)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{str(path)!r} is not a Parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches(1024):
        for row in batch.to_pylist():
            number += 1
            yield number, _without_nulls(row)


def _without_nulls(row: Row) -> Row:
    """The row without the nulls in its columns: a column of an Arrow table gives each object the keys of all others."""
    return {name: _stripped(value) for name, value in row.items()}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _from_disk(path: Path, split: str) -> Iterator[tuple[str, Row]]:
    """Rows of a directory that `Dataset.save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            splits = ", ".join(dataset)
            raise DataError(f"{str(path)!r} has no split {split!r}; it has {splits}")
        dataset = dataset[split]
    for number, row in enumerate(dataset, 1):
        yield f"{path}:{number}", _without_nulls(dict(row))


def _from_hub(name: str, split: str, streaming: bool) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    is_the_clients_own = load_dataset.__module__.startswith("datasets.")
    problem = why_no_dataset(name) if is_the_clients_own else None
    if problem is not None:
        raise DataError(f"there is no data file or directory {name!r}{_near(Path(name))}, and {problem}")
    try:
        dataset = load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # the hub's client raises the errors of many libraries
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{name!r} is not a file or directory, and loading it from the hub failed: {reason}") from error
    for number, row in enumerate(dataset, 1):
        yield f"{name}:{number}", _without_nulls(dict(row))


def _near(path: Path) -> str:
    """The nearest names in the directory of a missing file, for an error message."""
    if not path.parent.is_dir():
        return ""
    present = [p.name for p in path.parent.iterdir()]
    return nearest(path.name, present)


def _renamed(place: str, row: Row, columns: dict[str, str]) -> Row:
    """The row with its columns under veneer's names; `columns` maps these to the names in the data."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(f"{place} has no column {theirs!r} to use as {ours}{nearest(theirs, row)}")
    replaced = {*columns, *columns.values()}
    renamed = {name: value for name, value in row.items() if name not in replaced}
    for ours, theirs in columns.items():
        renamed[ours] = row[theirs]
    return renamed


class Strict(BaseModel):
    """A model that refuses unknown keys and takes the string below a field as its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Source(Strict):
    """A source of rows."""

    path: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet), a pattern (data/*.jsonl), a directory of files, or a hub id."""
    weight: float = Field(1.0, gt=0)
    """How often each row is seen in an epoch; 0.5 takes a random half. When streaming: the share of the rows drawn."""
    columns: dict[str, str] = {}
    """Names of columns: keys are veneer's names (prompt, answer, text ...), values are the names in the data."""
    split: str = "train"
    """Which split of a directory or a hub id."""
