"""The recipe that a run leaves beside its adapter, as keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

RECIPE_NAME = "recipe.yaml"


def read(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
        ConfigError: it is missing, or no YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {str(path)!r}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{str(path)!r} is not a YAML recipe: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} holds no keys of a recipe (`key: value` lines)")
    return content
