"""Upload an adapter to the Hugging Face hub, with its card and its report, and without the paths of this machine."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..core.config import CONFIG_NAME, Config
from ..core.remainder import TRAINING_NAME
from ..errors import CheckpointError, ConfigError, VeneerError
from ..files.read import WEIGHTS_NAME
from ..model.card import CARD_NAME, forget_paths, push_folder, write_card
from ..model.stages import START
from ..model.verify import PROBE_NAME
from .page import PAGE_NAME, example_of, render
from .report import REPORT_NAME, in_words, write_report

UPLOADED = (WEIGHTS_NAME, CONFIG_NAME, TRAINING_NAME, PROBE_NAME, CARD_NAME)
"""Files that are uploaded as they are; the report is written anew."""
LOG_IN = "`hf auth login` stores one; or set HF_TOKEN"


def check_token(repository: str) -> None:
    """Check that there is a token which may write to a repository, as far as the hub can be reached.

    Raises:
        ConfigError: there is no token, the hub refuses it, or it cannot write there.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"cannot upload to {repository!r}: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise ConfigError(f"uploading to {repository!r} needs a token of the Hugging Face hub; {LOG_IN}")
    try:
        who = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ConfigError(f"the Hugging Face hub refuses the token; {LOG_IN}") from None
        return
    except Exception:  # no connection now; the upload is tried at the end
        return
    owner = repository.partition("/")[0]
    owners = [who["name"], *[organisation["name"] for organisation in who.get("orgs", ())]]
    if owner not in owners:
        raise ConfigError(f"the hub's token belongs to {who['name']!r}, which cannot write to {repository!r}")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"the hub's token may only read; uploading to {repository!r} needs one that may write")


def push(directory: Path, repository: str, private: bool = True) -> str:
    """Upload an adapter's directory; returns the address of the repository.

    Args:
        repository: OWNER/NAME; created if it does not exist.
        private: whether a repository that is created is private.

    Raises:
        CheckpointError: the directory holds no adapter.
        VeneerError: the upload failed; says how to try again. The directory is not changed.
    """
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (directory / name).is_file():
            raise CheckpointError(f"{str(directory)!r} is not an adapter's directory: it has no {name}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _collect(directory, folder, repository)
        try:
            url = push_folder(folder, repo_id=repository, private=private, commit_message="Upload the adapter")
        except Exception as error:  # the hub's client raises the errors of several libraries
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            again = f"veneer push {shlex.quote(str(directory))} {repository}{'' if private else ' --public'}"
            raise VeneerError(
                f"the adapter in {str(directory)!r} is complete, but was not uploaded to {repository!r}: {reason}. "
                f"This tries again: {again}"
            ) from error
    return str(getattr(url, "repo_url", None) or f"https://huggingface.co/{repository}")


def _collect(directory: Path, folder: Path, repository: str) -> None:
    """Copy what is uploaded into a folder, with the card and the report as others should read them.

    The adapters that were merged into the base model for the training belong to it: without them, it cannot be loaded.
    """
    for name in UPLOADED:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, folder / name)
    if (directory / START).is_dir():
        shutil.copytree(directory / START, folder / START)
    for settings in folder.rglob(CONFIG_NAME):
        forget_paths(settings)
    config = Config.from_pretrained(folder)
    report = directory / REPORT_NAME
    if report.is_file():
        content = without_paths(json.loads(report.read_text(encoding="utf-8")), repository)
        write_report(folder, content)
        (folder / PAGE_NAME).write_text(render(content), encoding="utf-8")
        write_card(folder, config, in_words(content), name=repository, example=example_of(content))
    elif not (folder / CARD_NAME).is_file():
        write_card(folder, config, name=repository)


def without_paths(content: dict[str, Any], repository: str) -> dict[str, Any]:
    """The content of report.json with the repository as its output, and files without the directories they are in."""
    recipe = content["recipe"]
    sources = [source["path"] for source in recipe["data"] + recipe["eval_data"]]
    parents = set()
    single = [recipe.get(name) or "" for name in ("model", "output", "chat_template", "start_from")]
    for name in (*single, *sources):
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or name.startswith("~"):
            parents.add(name[: len(name) - len(path.name)])
    longest_first = sorted(parents - {""}, key=len, reverse=True)
    cleaned: dict[str, Any] = _replaced(content, longest_first)
    cleaned["recipe"]["output"] = repository
    return cleaned


def _replaced(value: Any, prefixes: list[str]) -> Any:
    """A value in which every text lacks the given parts."""
    if isinstance(value, str):
        for prefix in prefixes:
            value = value.replace(prefix, "")
        return value
    if isinstance(value, list):
        return [_replaced(item, prefixes) for item in value]
    if isinstance(value, dict):
        return {_replaced(key, prefixes): _replaced(item, prefixes) for key, item in value.items()}
    return value
