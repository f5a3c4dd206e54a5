"""Find a base model's directory and class, and copy the tokenizer and settings stored with its weights."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..core.config import Config, TaskType
from ..errors import CheckpointError, ConfigError, first_line
from ..files.locate import locate
from ..upstream import auto as auto_classes
from ..upstream.auto import AUTO_CLASSES

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Files to download for a model in safetensors with its tokenizer."""
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
CHAT_TEMPLATES = "additional_chat_templates"
"""The directory in which transformers saves the chat templates of a tokenizer that has several."""
TOKENIZER_PATTERNS = ("*.model", "*.spm", "*.tiktoken", "*.vocab", "merges*", "tokenization_*.py", "vocab*")
"""Further files of tokenizers: vocabularies under names of their own, and code."""
OTHERS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def find_base(name: str, revision: str | None = None) -> Path:
    """The directory of a base model, downloaded from the hub if it is not on this machine.

    Raises:
        CheckpointError: it is not on this machine and cannot be downloaded.
    """
    place = locate(name, revision)
    directory = Path(place.name)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        downloaded = snapshot_download(place.name, revision=revision, allow_patterns=list(WANTED), **place.arguments)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name!r} could not be downloaded from the hub: {first_line(error)}") from None
    return Path(downloaded)


def model_class(config: Any, adapters: Sequence[Config], keys: Collection[str]) -> Any:
    """The transformers class, with `from_config`, that the adapters were trained on.

    Args:
        config: the base model's config.
        keys: the keys of the adapters' files, which say what modules the class has.

    Raises:
        ConfigError: the adapters are for several tasks, or neither they nor the base's config name a class.
    """
    tasks = {adapter.task_type for adapter in adapters if adapter.task_type is not None}
    if len(tasks) > 1:
        names = ", ".join(sorted(tasks))
        raise ConfigError(f"the adapters are for several tasks ({names}); merge only adapters for one task")
    for task in tasks:
        assert isinstance(task, TaskType)
        auto = auto_classes.fitting(AUTO_CLASSES[task], config, keys)
        if auto is not None:
            return auto
    for name in config.architectures or ():
        named_class = auto_classes.model_class(name)
        if named_class is not None:
            return named_class
    raise ConfigError(
        f"it is unknown which {config.model_type} class the adapters were trained on; set task_type in their configs"
    )


def copy_settings(base: Path, adapters: Sequence[Path], out: Path) -> None:
    """Copy the base's settings and a tokenizer: that of the last adapter that has one, else the base's."""
    for name in OTHERS:
        _copy(base / name, out)
    sources = [directory for directory in (base, *adapters) if (directory / "tokenizer_config.json").is_file()]
    if not sources:
        return
    source = sources[-1]
    for name in TOKENIZER:
        _copy(source / name, out)
    for pattern in TOKENIZER_PATTERNS:
        for file in sorted(source.glob(pattern)):
            _copy(file, out)
    templates = source / CHAT_TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, out / CHAT_TEMPLATES)


def _copy(file: Path, into: Path) -> None:
    if file.is_file():
        shutil.copyfile(file, into / file.name)
