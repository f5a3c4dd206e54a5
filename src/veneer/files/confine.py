"""Paths that stand in configs: those of a file may not lead out of its directory, for anybody may have written it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .checked import Checked


def confine(config: Checked, home: Path, follow: bool) -> None:
    """Make the paths in a file's config absolute.

    Args:
        config: its fields are changed.
        home: the directory of the file, against which relative paths count.
        follow: paths may lead out of it.

    Raises:
        ConfigError: one leads out of `home`, by itself or through a link.
    """
    for f in fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if f.name in config.path_fields:
            setattr(config, f.name, _confined(value, home, follow, f.name))
        for inner in value if isinstance(value, list) else (value,):
            if isinstance(inner, Checked) and is_dataclass(inner):
                confine(inner, home, follow)


def _confined(value: Any, home: Path, follow: bool, field: str) -> Any:
    if isinstance(value, dict):
        return {name: _confined(path, home, follow, field) for name, path in value.items()}
    if isinstance(value, list):
        return [_confined(path, home, follow, field) for path in value]
    if not isinstance(value, str):
        return value
    inside, here = (home / value).resolve(), home.resolve()
    if here in inside.parents and inside.exists():
        return str(inside)
    if not follow:
        raise ConfigError(
            f"{field} names {value!r}, which is not inside {str(home)!r}, where its config was read; "
            "pass follow_paths=True to follow it all the same"
        )
    return value


def names_of_paths(config: Checked) -> frozenset[str]:
    """The fields that hold paths, of a config and of what it holds."""
    values = (getattr(config, f.name) for f in fields(config))  # type: ignore[arg-type]
    inner = [i for v in values for i in (v if isinstance(v, list) else (v,)) if isinstance(i, Checked)]
    return frozenset(config.path_fields).union(*map(names_of_paths, inner))


def without_paths(content: Any, names: frozenset[str]) -> Any:
    """A config file's content without the fields that hold paths: where things lie is not what they mean."""
    if isinstance(content, dict):
        return {name: without_paths(value, names) for name, value in content.items() if name not in names}
    return [without_paths(value, names) for value in content] if isinstance(content, list) else content
