"""`peft.tuners.lora.arrow`: where the experts of an Arrow come from, and how they are called."""

from __future__ import annotations

from pathlib import Path

from ...core.config import CONFIG_NAME
from ...errors import CheckpointError

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"


def _resolve_adapter_source(path: str) -> tuple[str, str | None]:
    """(directory or repository, folder in the repository) of an adapter's path, which may be "user/repo/a/folder".

    Raises:
        CheckpointError: the path is a directory without an adapter.
    """
    if Path(path).is_dir():
        if not (Path(path) / CONFIG_NAME).is_file():
            raise CheckpointError(f"Local adapter path '{path}' does not contain '{CONFIG_NAME}'.")
        return path, None
    owner, _, rest = path.strip("/").partition("/")
    if not rest:
        return path, None
    name, _, folder = rest.partition("/")
    return f"{owner}/{name}", folder or None
