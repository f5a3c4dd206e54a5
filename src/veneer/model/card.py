"""Publishing an adapter: its model card, and the upload to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..core.config import Config
from ..files.write import write_atomically
from ..upstream.auto import AUTO_CLASSES

CARD_NAME = "README.md"
USE = """## Use

```python
from transformers import {auto}
from veneer import PeftModel  # or from peft

base = {auto}.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "this adapter")
```
"""
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}


def write_card(directory: Path, config: Config, facts: str = "") -> None:
    """Write README.md with the metadata that the hub reads and instructions to load the adapter.

    A local base model is left out: its path means nothing to others.

    Args:
        directory: the adapter's directory.
        config: the adapter's config.
        facts: further Markdown, placed before the instructions.
    """
    from huggingface_hub import ModelCardData

    task = config.task_type or ""
    method = config.peft_type.lower()
    base = _public_base(config)
    title = f"A {method} adapter"
    tags = [method, "veneer"]
    if base:
        title += f" for {base}"
        tags.append(f"base_model:adapter:{base}")
    data = ModelCardData(base_model=base, library_name="peft", pipeline_tag=PIPELINES.get(task), tags=tags)
    auto = AUTO_CLASSES.get(task, "AutoModel")
    usage = USE.format(auto=auto, base=base or "the base model")
    text = f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{facts}{usage}"
    write_atomically(directory / CARD_NAME, text.encode())


def _public_base(config: Config) -> str | None:
    """The hub id of the base model; None if it is unknown or a local path."""
    name = config.base_model_name_or_path
    if not name or Path(name).exists():
        return None
    return name


def push(saves: Any, repo_id: str, **settings: Any) -> Any:
    """Save a model or a config into a temporary folder, add a card, and upload the folder.

    Args:
        saves: a model or a config; anything with `save_pretrained`.
        repo_id: the repository to upload to.
        settings: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`; other
            arguments of transformers' `push_to_hub` are ignored.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_settings = {}
        if "safe_serialization" in settings:
            save_settings["safe_serialization"] = settings["safe_serialization"]
        saves.save_pretrained(folder, **save_settings)
        configs = getattr(saves, "peft_config", None)
        if configs and not (Path(folder) / CARD_NAME).exists():
            first_config = next(iter(configs.values()))
            write_card(Path(folder), first_config)
        return push_folder(folder, repo_id=repo_id, **settings)


def push_folder(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
    **ignored: Any,
) -> Any:
    """Upload a saved adapter; the repository is created if it does not exist."""
    from huggingface_hub import create_repo, upload_folder

    url = create_repo(repo_id or Path(folder).name, token=token, private=private, exist_ok=True)
    full_id = getattr(url, "repo_id", repo_id)
    return upload_folder(
        repo_id=str(full_id),
        folder_path=str(folder),
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        token=token,
        create_pr=create_pr,
        revision=revision,
    )
