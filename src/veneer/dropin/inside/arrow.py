"""`peft.tuners.lora.arrow`: where the experts of an Arrow come from, and how they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ...core.config import CONFIG_NAME
from ...errors import CheckpointError
from ...model.arrow import arrow_router
from ..configs import as_peft, hub_arguments
from ..wording import pefts_words

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"


@pefts_words()
def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: Any,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """A model with one adapter, "arrow_router", which routes each token among trained LoRA adapters.

    Args:
        adapter_kwargs: `subfolder`, `revision` and the like, and `autocast_adapter_dtype`; PEFT passes them to
            `load_adapter` for each expert.
    """
    from ..models import get_peft_model

    names = hub_arguments()
    hub = {name: value for name, value in adapter_kwargs.items() if name in names}
    router = arrow_router(task_specific_adapter_paths, arrow_config, general_adapter_paths, **hub)
    router.fill_targets(base_model)
    lift = adapter_kwargs.get("autocast_adapter_dtype", True)
    return get_peft_model(base_model, as_peft(router), "arrow_router", autocast_adapter_dtype=lift).eval()


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
