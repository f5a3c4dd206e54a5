"""A base model's directory: found on this machine or the hub, its class, and the small files beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.config import Config, TaskType
from ..errors import CheckpointError, ConfigError
from ..files.pull import resolve
from ..upstream import auto as auto_classes
from ..upstream.auto import AUTO_CLASSES

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What is asked of the hub for a model in safetensors with its tokenizer."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
OTHERS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def find_base(name: str, revision: str | None = None) -> Path:
    """The directory of a base model; one that is only on the hub is downloaded.

    Raises:
        CheckpointError: it is neither here nor there.
    """
    found = Path(resolve(name))
    if found.is_dir():
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{name!r} is no directory, and could not be had from the hub: {reason}") from None


def model_class(config: Any, adapters: Sequence[Config]) -> Any:
    """The transformers class (of `from_config`) that the adapters of one task were trained on.

    Raises:
        ConfigError: the adapters are of several tasks, or nothing says which class it is.
    """
    tasks = {adapter.task_type for adapter in adapters if adapter.task_type is not None}
    if len(tasks) > 1:
        raise ConfigError(f"the adapters are for several tasks ({', '.join(sorted(tasks))}); merge those of one")
    for task in tasks:
        assert isinstance(task, TaskType)
        auto = auto_classes.makes(AUTO_CLASSES[task], config)
        if auto is not None:
            return auto
    for name in config.architectures or ():
        found = auto_classes.model_class(name)
        if found is not None:
            return found
    raise ConfigError(f"nothing says which class of {config.model_type} the adapters are for; set their task_type")


def copy_beside(base: Path, adapters: Sequence[Path], out: Path) -> None:
    """The tokenizer and the settings of generation; of the last adapter that brings a tokenizer, else the base's."""
    homes = [home for home in (base, *adapters) if (home / "tokenizer_config.json").is_file()]
    for name in OTHERS:
        _copy(base / name, out)
    for name in TOKENIZER if homes else ():
        _copy(homes[-1] / name, out)


def _copy(file: Path, into: Path) -> None:
    if file.is_file():
        shutil.copyfile(file, into / file.name)
