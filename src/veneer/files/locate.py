"""Finding a base model by its name: local names first, then one brief question to the Hugging Face hub.

The hub's client repeats a request for a minute if there is no network. A mistyped name should not take that long.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, first_line, printable, similar
from .pull import MODELS, resolve

SECONDS = 5.0
"""How long the hub has to answer."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CONFIG = "config.json"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Place:
    """Where a base model is."""

    name: str
    """The first argument of `from_pretrained`: a directory or a hub id."""
    only_local: bool = False
    """The hub cannot be reached, and the model is in the hub's cache."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained`."""
        return {"local_files_only": True} if self.only_local else {}


def locate(model: str, revision: str | None = None) -> Place:
    """Find a base model.

    Args:
        model: a directory, a GGUF file, a name that `veneer pull` knows, or a hub id.
        revision: the revision of a hub id.

    Raises:
        ConfigError: there is no such model; the message gives the nearest names.
    """
    name = resolve(os.path.expanduser(model), revision)
    path = Path(name)
    if path.is_dir():
        _check_directory(path)
        return Place(name)
    if path.is_file():
        raise ConfigError(
            f"the model {model!r} is a file; give the directory with its config and weights, or a GGUF file"
        )
    if path.is_absolute() or not HUB_ID.fullmatch(name):
        raise ConfigError(f"the model {model!r} is not there: no such directory{_nearest(name, CONFIG)}")
    return on_hub(name, CONFIG, revision or "main")


def _check_directory(path: Path) -> None:
    """Raise ConfigError if a directory does not hold a model."""
    if (path / CONFIG).is_file():
        return
    names = sorted(printable(entry.name, 80) for entry in path.iterdir())
    if not names:
        raise ConfigError(f"the model's directory {str(path)!r} is empty; give one with a config and weights")
    if (path / ADAPTER).is_file():
        raise ConfigError(
            f"{str(path)!r} holds an adapter, not a model; give it as the adapter, and its base model as the model"
        )
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ConfigError(f"{str(path)!r} is not a model: it has no {CONFIG}. It holds {shown}")


@cache
def on_hub(name: str, file: str, revision: str = "main") -> Place:
    """A repository of the hub that has a file, or whose file is in the hub's cache.

    Raises:
        ConfigError: the hub and its cache do not have it; the message gives the nearest names on this machine.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    if not hf_hub_download.__module__.startswith("huggingface_hub."):  # replaced, as by the client of another hub
        return Place(name)
    is_cached = isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    try:
        _ask(name, file, revision)
        return Place(name)
    except RepositoryNotFoundError:
        reason = "and the hub has none of this name, or it is private and needs a login (`hf auth login`)"
    except EntryNotFoundError:
        reason = f"and the hub's repository of this name has no {file}"
    except HfHubHTTPError as error:  # such as a model that needs consent, or a revision that does not exist
        status = getattr(error.response, "status_code", 500)
        if is_cached and status >= 500:
            return Place(name, only_local=True)
        reason = f"and the hub refuses it: {first_line(error)}"
    except Exception as error:  # no network: the client's errors are those of httpx and other libraries
        if is_cached:
            return Place(name, only_local=True)
        reason = f"and the hub cannot be reached: {first_line(error)}"
    raise ConfigError(f"there is no directory {name!r}{_nearest(name, file)}; {reason}")


@cache
def why_no_dataset(name: str) -> str | None:
    """Why the hub's dataset of a name cannot be loaded; None if the hub has it, or a cache on this machine."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    try:
        _ask(name, ".gitattributes", "main", "dataset")
    except EntryNotFoundError:  # the repository exists
        return None
    except RepositoryNotFoundError:
        return "the hub has no dataset of this name, or it is private and needs a login (`hf auth login`)"
    except HfHubHTTPError:  # loading it says why
        return None
    except Exception as error:  # no network, as in `on_hub`
        in_hub_cache = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
        in_own_cache = Path(constants.HF_HOME) / "datasets" / name.replace("/", "___")
        if not in_hub_cache.exists() and not in_own_cache.exists():
            return f"the hub cannot be reached: {first_line(error)}"
    return None


def _ask(name: str, file: str, revision: str, repo_type: str | None = None) -> None:
    """Ask the hub once for a file.

    Raises:
        Exception: the hub does not have it, or cannot be reached.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    get_hf_file_metadata(hf_hub_url(name, file, repo_type=repo_type, revision=revision), timeout=SECONDS)


def _nearest(name: str, file: str) -> str:
    """The similar names on this machine, for an error message: of directories with a file, and of known models."""
    path = Path(name)
    directories = {}
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if (entry / file).is_file():
                directories[entry.name] = str(path.parent / entry.name)
    known = list(MODELS) if file == CONFIG else []
    close = [directories.get(entry, entry) for entry in similar(path.name, [*directories, *known])]
    if file == CONFIG:
        close += similar(name, _cached())
    return f"; nearest: {', '.join(close[:3])}" if close else ""


def _cached() -> Iterable[str]:
    """Ids of the models in the hub's cache."""
    from huggingface_hub import constants

    for directory in Path(constants.HF_HUB_CACHE).glob("models--*"):
        yield directory.name.removeprefix("models--").replace("--", "/")
