"""The oldest and newest versions of other libraries that veneer was tested with.

The oldest are those in `pyproject.toml` and `constraints-oldest.txt`, the newest those in `constraints.txt`;
`tests/test_versions.py` checks that they agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class Range:
    """The versions from `oldest` to `newest`, inclusive."""

    oldest: str
    newest: str

    def place_of(self, version: str) -> str | None:
        """Whether a version is "older" or "newer" than the range; None if it is inside.

        Builds ("+cpu") and patch releases of the newest version ("5.24.3") are inside.
        """
        try:
            parsed = Version(version)
        except InvalidVersion:
            return None
        if parsed < Version(self.oldest):
            return "older"
        return "newer" if parsed.release[:2] > Version(self.newest).release[:2] else None

    def __str__(self) -> str:
        return f"{self.oldest} to {self.newest}"


TRIED = {
    "torch": Range("2.9.0", "2.13.0"),
    "transformers": Range("5.20.0", "5.24.0"),
    "accelerate": Range("1.12.0", "1.15.0"),
    "datasets": Range("4.8.0", "5.2.0"),
    "huggingface_hub": Range("1.32.0", "2.4.0"),
    "tokenizers": Range("0.23.1", "0.23.3"),
    "safetensors": Range("0.8.0", "0.8.0"),
    "numpy": Range("2.1.0", "2.4.6"),
    "trl": Range("1.12.0", "1.16.0"),
    "diffusers": Range("0.40.0", "0.42.1"),
    "sentence-transformers": Range("6.0.0", "6.2.0"),
    "bitsandbytes": Range("0.49.0", "0.50.2"),
    "torchao": Range("0.17.0", "0.18.0"),
}
"""The tested versions by distribution name; the last five are optional."""


@dataclass(frozen=True)
class Untried:
    """An installed library whose version is outside the tested range."""

    name: str
    version: str
    place: str
    """"older" or "newer"."""
    tried: Range

    def __str__(self) -> str:
        bound = "oldest" if self.place == "older" else "newest"
        at = self.tried.oldest if self.place == "older" else self.tried.newest
        return f"{self.name} {self.version} is {self.place} than the {bound} version that was tried, {at}"


def installed(name: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def untried() -> list[Untried]:
    """The installed libraries whose versions are outside the tested ranges."""
    outside = []
    for name, tried in TRIED.items():
        version = installed(name)
        place = None if version is None else tried.place_of(version)
        if version is not None and place is not None:
            outside.append(Untried(name, version, place, tried))
    return outside


def remark() -> str | None:
    """A line about untested versions, to add to an error; None if all versions were tested."""
    outside = untried()
    if not outside:
        return None
    return f"note: {'; '.join(map(str, outside))}; the error may come from that (`veneer doctor` lists the versions)"


@contextmanager
def remarked() -> Iterator[None]:
    """Add a note about untested versions to an error that leaves the block; only to the first error of a process."""
    try:
        yield
    except Exception as error:
        _add_remark(error)
        raise


_is_remarked = False


def _add_remark(error: Exception) -> None:
    global _is_remarked
    line = None if _is_remarked else remark()
    if line is None:
        return
    _is_remarked = True
    if hasattr(error, "add_note"):
        error.add_note(line)
    else:  # Python 3.10
        warnings.warn(line, stacklevel=3)
