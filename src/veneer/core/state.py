"""The state of one adapted model: its adapters, which of them are active, and the facts of the current call.

There is one `State` per model. Every layer holds a reference to it, so switching adapters sets one attribute. A
pre-hook on the Hugging Face model sets `facts` in each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

from torch import nn

from ..targets.modules import Modules
from .adapter import Adapter

if TYPE_CHECKING:
    from .config import Config
    from .layer import AdapterLayer

BASE = "__base__"
"""The adapter name that stands for no adapter in a mixed batch."""
Row = str | tuple[str, ...]
"""What one row of a mixed batch uses: an adapter, `BASE`, or several adapters, innermost first."""


LOSS_TERMS = "loss_terms"
"""The fact that holds what the adapters' loss terms added to the loss of the call."""
BY_TOKEN = {"linear", "embedding", "norm", "param"}
"""Kinds of modules that process each token independently."""


class Layers(MutableMapping[str, "AdapterLayer"]):
    """Layers by path, as weak references. torch cannot trace `weakref.WeakValueDictionary`, which would do the same."""

    def __init__(self, layers: Mapping[str, AdapterLayer] | None = None) -> None:
        self._refs: dict[str, weakref.ref[AdapterLayer]] = {}
        for path, layer in (layers or {}).items():
            self[path] = layer

    def __getitem__(self, path: str) -> AdapterLayer:
        layer = self._refs[path]()
        if layer is None:
            raise KeyError(path)
        return layer

    def __setitem__(self, path: str, layer: AdapterLayer) -> None:
        self._refs[path] = weakref.ref(layer)

    def __delitem__(self, path: str) -> None:
        del self._refs[path]

    def items(self) -> list[tuple[str, AdapterLayer]]:  # type: ignore[override]  # three times as fast as the mixin's
        pairs = []
        for path, ref in self._refs.items():
            layer = ref()
            if layer is not None:
                pairs.append((path, layer))
        return pairs

    def __iter__(self) -> Iterator[str]:
        return iter([path for path, _ in self.items()])

    def __len__(self) -> int:
        return len(self.items())


class State:
    """The adapters of one model and the facts of its current call."""

    def __init__(self, layer_class: type[AdapterLayer]) -> None:
        self.layer_class = layer_class
        """The class that wraps an adapted module."""
        self.configs: dict[str, Config] = {}
        """The config of each adapter, by name."""
        self.layers = Layers()
        self.shared = Modules()
        """The modules that the layers of an adapter share, by adapter name."""
        self.prompts = Modules()
        """Learned prompts, by adapter name."""
        self.active: tuple[str, ...] = ()
        """The active adapters, innermost first."""
        self.trainable: set[str] = set()
        """The names of the adapters that are trained while they are active."""
        self.schedules: dict[str, Any] = {}
        """Objects whose `step(n)` is called after the n-th optimizer step, by adapter name."""
        self.reshaped: list[Any] = []
        """Changes of the base model, which are undone in reverse order when the last adapter is removed."""
        self.watchers: list[Any] = []
        """Objects whose `before(model, kwargs)` and `after(model, output)` are called around each call of the model."""
        self.watch: set[str] | None = None
        """If it is a set, reading a layer's `weight` adds its path. Some layers are only read and never called."""
        self.arguments: tuple[str, ...] = ("input_ids",)
        """The names of the positional arguments of the model's `forward`."""
        self.encoder_arguments: tuple[str, ...] = ("input_ids",)
        """The names of the positional arguments of its encoder's `forward`."""
        self.cache_argument: str | None = None
        """The name of the model's argument that takes the cache."""
        self.is_sharded = False
        """Whether FSDP shards the `PeftModel` around the model."""
        self.enabled = True
        self.facts: dict[Any, Any] = {}
        """Values that the current call passes to the adapters. Kept until the next call, for recomputation."""
        self.sticky: dict[str, Any] = {}
        """Facts that apply to every call inside a `remembering` block."""
        self.busy = False
        """Whether a method is calling the model, or parts of it, to compute its facts."""
        self.memo: dict[Any, Any] | None = None
        """A cache for values that depend on adapters only; None while adapters may change."""
        self.lock = RLock()
        """Held during a call of the model, so that calls from several threads run one after another."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are made between calls, so they leave out the facts of the last one."""
        of_call = {"facts": {}, "sticky": {}, "busy": False, "memo": None, "watch": None, "lock": None}
        return {**self.__dict__, "layers": dict(self.layers), **of_call}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.layers = Layers(attributes["layers"])
        self.lock = RLock()

    def are_by_token(self) -> bool:
        """Whether the active adapters process each token independently in the current call.

        They do if the call has no facts, no prompt is active, and all adapted modules process tokens independently.
        """
        has_prompt = any(name in self.prompts for name in self.active)
        if self.facts or has_prompt:
            return False
        return all(layer.target.kind in BY_TOKEN for layer in self.layers.values())

    def fact_names(self) -> set[str]:
        """The keyword arguments of a model call that are meant for adapters."""
        names = {"adapter_names"}
        for config in self.configs.values():
            for member in config.members():
                names.update(member.facts)
        return names

    def adapters(self, name: str) -> dict[str, Adapter]:
        """The adapters called `name`, by path."""
        adapters = {}
        for path, layer in self.layers.items():
            by_name = layer.adapters._modules
            if name in by_name:
                adapters[path] = by_name[name]
        return adapters  # type: ignore[return-value]

    def modules(self, name: str) -> Iterator[nn.Module]:
        """All modules that hold parameters of the adapter called `name`."""
        yield from self.adapters(name).values()
        for module in (self.shared.get(name), self.prompts.get(name)):
            if module is not None:
                yield module

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of the adapter called `name` that can be trained."""
        for module in self.modules(name):
            yield from module.learned() if isinstance(module, Adapter) else module.parameters()

    def activate(self, names: tuple[str, ...]) -> None:
        """Make `names` the active adapters. Parameters require gradients if their adapter is trainable and active."""
        changed = {*self.active, *names}
        self.active = names
        for name in changed:
            self.mark(name)

    def mark(self, name: str) -> None:
        """Set requires_grad of one adapter's parameters; False if it is inactive, or DDP would wait for gradients."""
        learns = name in self.trainable and name in self.active
        for parameter in self.parameters(name):
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)

    def live(self) -> tuple[str, ...]:
        """The active adapters; none while adapters are disabled."""
        return self.active if self.enabled else ()

    @contextmanager
    def remembering(self, facts: dict[str, Any], memo: dict[Any, Any] | None = None) -> Iterator[None]:
        """Pass `facts` to every model call inside the block, such as those of `generate`.

        No adapter may change inside the block, so `memo` is available there.

        Args:
            memo: that of an earlier block with the same facts, since which no adapter has changed; None: an empty one.
        """
        sticky, current, earlier = self.sticky, self.facts, self.memo
        self.sticky = {**sticky, **facts}
        self.facts = {**current, **self.sticky}
        self.memo = {} if memo is None else memo
        try:
            yield
        finally:
            self.sticky = sticky
            self.facts = current
            self.memo = earlier

    @contextmanager
    def running(self, names: tuple[str, ...]) -> Iterator[None]:
        """Run the block with `names` active, innermost first. What requires gradients does not change."""
        before = self.active, self.enabled
        self.active, self.enabled = names, True
        try:
            yield
        finally:
            self.active, self.enabled = before

    @contextmanager
    def switched(self, *, enabled: bool) -> Iterator[None]:
        """Enable or disable all adapters inside the block."""
        before = self.enabled
        self.enabled = enabled
        try:
            yield
        finally:
            self.enabled = before


def adapters_of(row: Row) -> tuple[str, ...]:
    """The names of the adapters that a row of a mixed batch uses, innermost first."""
    if isinstance(row, str):
        return () if row == BASE else (row,)
    return tuple(row)


def state_of(model: nn.Module) -> State | None:
    """The state of an adapted Hugging Face model; None if it has no adapters."""
    return model.__dict__.get("_veneer")


class Remember:
    """Records the facts of a forward pass, so that activation checkpointing recomputes it with the same facts."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.facts = self.state.facts

    def __exit__(self, *exc: Any) -> None:
        pass


class Recall:
    """Restores the facts that `Remember` recorded, during the recomputation."""

    def __init__(self, note: Remember) -> None:
        self.note = note

    def __enter__(self) -> None:
        state = self.note.state
        self.before, state.facts = state.facts, self.note.facts

    def __exit__(self, *exc: Any) -> None:
        self.note.state.facts = self.before


class CheckpointContext:
    """The `context_fn` for `torch.utils.checkpoint`. It is a class, so that a model that holds it can be pickled."""

    def __init__(self, state: State) -> None:
        self.state = state

    def __call__(self) -> tuple[Remember, Recall]:
        note = Remember(self.state)
        return note, Recall(note)
