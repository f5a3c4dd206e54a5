"""The adapters that a server knows by name, and those of them that are in memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.config import CONFIG_NAME
from ..core.state import BASE, State, state_of
from ..errors import ConfigError, VeneerError, nearest
from ..model.peft_model import PeftModel
from . import batch
from .errors import Refused

LOG = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What an adapter may be called: a plain name, never a path."""
JOIN = "+"
"""Stands between the names of adapters that are stacked."""


class Adapters:
    """A base model and its adapters by name. Only the engine's thread loads them, or runs the model.

    Args:
        model: the base model.
        base: the base model's name for clients.
        places: directories or hub ids by name.
        folder: a directory whose subdirectories are adapters too, by their names.
        most: how many adapters are kept in memory.
    """

    def __init__(self, model: Any, base: str, places: Mapping[str, str], folder: Path | None, most: int) -> None:
        self.model = model.eval()
        self.base_model = model
        self.base = base
        self.folder = folder
        self.most = most
        self.shares = batch.can_share(model)
        self.places = {name: place for name, place in places.items() if self._check_name(name)}
        for name in self.in_folder():
            self.places.setdefault(name, str(self.folder / name))  # type: ignore[operator]
        self.loaded: dict[str, None] = {}
        """Names in memory, the least recently used first."""

    # Names

    def _check_name(self, name: str) -> bool:
        if not NAME.fullmatch(name) or name in (self.base, BASE):
            raise ConfigError(
                f"an adapter cannot be called {name!r}: a name has letters, digits, '.', '_' and '-', and is not the "
                f"base model's; choose another one with NAME=DIR"
            )
        return True

    def in_folder(self) -> list[str]:
        """The names of the adapters in the folder."""
        if self.folder is None:
            return []
        entries = sorted(path.name for path in self.folder.iterdir() if (path / CONFIG_NAME).is_file())
        return [name for name in entries if NAME.fullmatch(name) and name not in (self.base, BASE)]

    def names(self) -> list[str]:
        """Everything that can be asked for, except stacks: the base, then the adapters."""
        return [self.base, *self.places]

    def resolve(self, model: str) -> tuple[str, ...]:
        """The adapters, innermost first, that a request's `model` names; none for the base.

        Raises:
            Refused: there is no such model.
        """
        if model == self.base:
            return ()
        names = tuple(model.split(JOIN))
        for name in names:
            if name not in self.places:
                near = nearest(name, self.names())
                raise Refused(
                    404,
                    f"there is no model or adapter {name[:200]!r}{near} (GET /v1/models lists all)",
                    code="model_not_found",
                    param="model",
                )
        if len(set(names)) < len(names):
            raise Refused(400, f"model {model[:200]!r} names an adapter twice", param="model")
        if len(names) > self.most:
            message = f"model names {len(names)} adapters, and the server keeps {self.most} in memory; name fewer"
            raise Refused(400, message, param="model")
        return names

    # Memory

    @property
    def state(self) -> State | None:
        return state_of(self.base_model)

    def ensure(self, names: Collection[str], used: Collection[str]) -> bool:
        """Load adapters that are not in memory, in place of the least recently used; False if there is no room yet.

        Args:
            names: the adapters to load.
            used: adapters that running requests need.

        Raises:
            VeneerError: an adapter is damaged, or does not fit the base model.
        """
        kept = {*names, *used}
        room = self.most - len(kept | self.loaded.keys())
        unused = [name for name in self.loaded if name not in kept]
        if room + len(unused) < 0:
            return False
        for name in unused[: max(0, -room)]:
            self.drop(name)
        for name in names:
            if name not in self.loaded:
                self._load(name)
            self.loaded[name] = self.loaded.pop(name, None)
        return True

    def _load(self, name: str) -> None:
        place = self.places[name]
        if self.state is None:
            self.model = PeftModel.from_pretrained(self.base_model, place, name)
        else:
            self.model.load_adapter(place, name)
            self.model.eval()
        self.loaded[name] = None
        try:
            self._check(name)
        except Exception:
            self.drop(name)
            raise
        LOG.info("adapter %s is in memory", name)

    def _check(self, name: str) -> None:
        """Raise VeneerError for an adapter that cannot answer requests, or would change what others get."""
        assert self.state is not None
        self.state.watchers.clear()  # the guard of training
        if self.state.reshaped:
            raise VeneerError(f"adapter {name!r} changes the layers of the base model, so it cannot share it; merge it")
        if getattr(self.state.configs[name], "adapter_names", None):
            raise VeneerError(f"adapter {name!r} reads other adapters; combine them into one (`veneer combine`)")
        for module in self.state.modules(name):
            for parameter in module.parameters():
                if not torch.isfinite(parameter).all():
                    raise VeneerError(f"adapter {name!r} holds values that are not finite; train it again")
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.base_model.get_input_embeddings().weight.device)
        with torch.no_grad(), self.state.running((name,)):
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids))  # raises if it needs facts of a call

    def drop(self, name: str) -> None:
        """Remove an adapter from memory."""
        if self.loaded.keys() == {name}:
            self.model.unload()
            self.model = self.base_model
        else:
            self.model.delete_adapter(name)
        del self.loaded[name]

    # Requests of a client

    def add(self, name: str, used: Collection[str]) -> None:
        """Serve an adapter of the folder; it is loaded, and so verified, at once.

        Raises:
            Refused: it is not in the folder, or it cannot be loaded.
        """
        if name not in self.in_folder():
            near = nearest(name, self.in_folder())
            raise Refused(404, f"the directory of --adapters has no adapter {name[:200]!r}{near}", param="lora_name")
        if name in used:
            raise Refused(409, f"adapter {name!r} is answering requests; try again when they are finished")
        if name in self.loaded:
            self.drop(name)
        is_new = name not in self.places
        self.places[name] = str(self.folder / name)  # type: ignore[operator]
        try:
            if not self.ensure((name,), used):
                raise Refused(429, "all adapters in memory are answering requests; try again", retry_after=1)
        except VeneerError as error:
            LOG.error("adapter %s: %s", name, error)
            if is_new:
                del self.places[name]
            raise unusable(name) from None

    def remove(self, name: str, used: Collection[str]) -> None:
        """Serve an adapter no longer."""
        if name not in self.places:
            raise Refused(404, f"there is no adapter {name[:200]!r}{nearest(name, self.places)}", param="lora_name")
        if name in used:
            raise Refused(409, f"adapter {name!r} is answering requests; try again when they are finished")
        if name in self.loaded:
            self.drop(name)
        del self.places[name]

    # How a request runs

    def runs_alone(self, names: Collection[str]) -> bool:
        """Whether a sequence with these adapters must be computed in the calls that `generate` would make."""
        if not self.shares:
            return True
        state = self.state
        for name in names:
            assert state is not None
            members = state.configs[name].members()
            is_mixture = name in state.prompts and bool(state.adapters(name))
            if is_mixture or any(member.depends_on_call() for member in members):
                return True
        return False

    def prompts(self, names: Collection[str]) -> list[str]:
        """Those of the adapters that put learned positions in front of the input."""
        state = self.state
        return [] if state is None else [name for name in names if name in state.prompts]

    def learned_positions(self, names: Collection[str]) -> int:
        return sum(self.state.prompts[name].n for name in self.prompts(names))  # type: ignore[union-attr, misc]

    def uses_cache(self, names: Collection[str]) -> bool:
        state = self.state
        if state is None:
            return True
        for name in names:
            for member in state.configs[name].members():
                if member.generate_with.get("use_cache") is False:
                    return False
        return True


def unusable(name: str) -> Refused:
    """The error for an adapter that cannot be loaded. Its reason may contain paths, so only the log has it."""
    return Refused(500, f"adapter {name!r} cannot be loaded; the server's log says why", code="adapter_not_loaded")
