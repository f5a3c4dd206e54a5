"""Reading recipes: the YAML files that describe training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

RECIPE_NAME = "recipe.yaml"


def read(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, or does not hold a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"there is no recipe {str(path)!r}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{str(path)!r} is not a YAML recipe: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} is not a recipe: it must consist of `key: value` lines")
    return content
