"""Paths in configs: because a file may have an unknown author, its paths may not lead out of its directory."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .checked import Checked


def confine(config: Checked, home: Path, follow: bool) -> None:
    """Make the paths in a config that was read from a file absolute, in place.

    Args:
        config: the config.
        home: the directory of the file; relative paths start here.
        follow: allow paths that lead out of `home`.

    Raises:
        ConfigError: a path leads out of `home`, directly or through a link.
    """
    for f in fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if f.name in config.path_fields:
            setattr(config, f.name, _confined(value, home, follow, f.name))
        for inner in _configs_in(value):
            if is_dataclass(inner):
                confine(inner, home, follow)


def _configs_in(value: Any) -> list[Checked]:
    """The configs in a field's value: itself, or the items of a list."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Checked)]


def _confined(value: Any, home: Path, follow: bool, field: str) -> Any:
    """The value of a path field, with the paths that lie inside `home` made absolute."""
    if isinstance(value, dict):
        return {name: _confined(path, home, follow, field) for name, path in value.items()}
    if isinstance(value, list):
        return [_confined(path, home, follow, field) for path in value]
    if not isinstance(value, str):
        return value
    path = (home / value).resolve()
    if home.resolve() in path.parents and path.exists():
        return str(path)
    if not follow:
        raise ConfigError(
            f"{field} names {value!r}, which is not inside {str(home)!r}, the directory of the config; "
            "pass follow_paths=True if you trust the file"
        )
    return value


def names_of_paths(config: Checked) -> frozenset[str]:
    """Names of the fields that hold paths, in a config and in the configs inside it."""
    names = frozenset(config.path_fields)
    for f in fields(config):  # type: ignore[arg-type]
        for inner in _configs_in(getattr(config, f.name)):
            names |= names_of_paths(inner)
    return names


def without_paths(content: Any, names: frozenset[str]) -> Any:
    """The content of a config file without path fields: the meaning of a config does not depend on locations."""
    if isinstance(content, dict):
        return {name: without_paths(value, names) for name, value in content.items() if name not in names}
    if isinstance(content, list):
        return [without_paths(value, names) for value in content]
    return content
