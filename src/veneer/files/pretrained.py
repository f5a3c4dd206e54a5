"""What the config of a base model says, if it is on this machine. Nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path


def vocabulary_size(name: str | None, revision: str | None = None) -> int | None:
    """The vocabulary size in a base model's config; None if the config is not here, or has none.

    Args:
        name: a directory, or a hub id whose config may be in the cache.
        revision: the revision of the hub id.
    """
    path = _config_file(name, revision) if name else None
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for config in (content, content.get("text_config")):
        size = config.get("vocab_size") if isinstance(config, dict) else None
        if isinstance(size, int):
            return size
    return None


def _config_file(name: str, revision: str | None) -> Path | None:
    from .pull import where

    local = where(name) / "config.json"
    if local.is_file():
        return local
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None
