"""Uploading an adapter to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def push(saves: Any, repo_id: str, **settings: Any) -> Any:
    """Save a model or a config into a folder of its own and upload that."""
    names = ("max_shard_size", "use_temp_dir", "safe_serialization", "tags", "deprecated_kwargs")
    with tempfile.TemporaryDirectory() as folder:
        own = {"safe_serialization": settings["safe_serialization"]} if "safe_serialization" in settings else {}
        saves.save_pretrained(folder, **own)
        return push_folder(folder, repo_id=repo_id, **{n: v for n, v in settings.items() if n not in names})


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
