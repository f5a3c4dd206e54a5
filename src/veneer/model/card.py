"""An adapter for others: the card that says what it is, and the upload to the Hugging Face hub."""

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
    """README.md with what the hub reads of an adapter, and how to load it. The name of a local base is not told.

    Args:
        facts: more to say, as Markdown.
    """
    from huggingface_hub import ModelCardData

    kind, method = config.task_type, config.peft_type.lower()
    name = config.base_model_name_or_path
    base = name if name and not Path(name).exists() else None
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=PIPELINES.get(kind or ""),
        tags=[method, "veneer", *([f"base_model:adapter:{base}"] if base else [])],
    )
    auto = AUTO_CLASSES.get(kind or "", "AutoModel")
    use = USE.format(auto=auto, base=base or "the base model")
    of = f" for {base}" if base else ""
    text = f"---\n{data.to_yaml()}\n---\n\n# A {method} adapter{of}\n\n{facts}{use}"
    write_atomically(directory / CARD_NAME, text.encode())


def push(saves: Any, repo_id: str, **settings: Any) -> Any:
    """Save a model or a config into a folder of its own, with a card, and upload that.

    Args:
        settings: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`; others that
            transformers' `push_to_hub` knows are passed over.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = {"safe_serialization": settings["safe_serialization"]} if "safe_serialization" in settings else {}
        saves.save_pretrained(folder, **own)
        configs = getattr(saves, "peft_config", None)
        if configs and not (Path(folder) / CARD_NAME).exists():
            write_card(Path(folder), next(iter(configs.values())))
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
    """Upload a saved adapter; the repository is made where there is none."""
    from huggingface_hub import create_repo, upload_folder

    url = create_repo(repo_id or Path(folder).name, token=token, private=private, exist_ok=True)
    return upload_folder(
        repo_id=str(getattr(url, "repo_id", repo_id)),
        folder_path=str(folder),
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        token=token,
        create_pr=create_pr,
        revision=revision,
    )
