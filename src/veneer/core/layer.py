"""`AdapterLayer`, the only wrapper: it runs the active adapters around one module, in one order, for every method.

Order of composition: `pre` from the outermost adapter in, the base module once, `post` from the innermost out; `fold`
in the same order, so merged equals active.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import NotMergeable, VeneerError
from ..ops import folded_linear as folded
from ..ops import is_autocast, is_fast
from ..ops import low_rank_linear as low_rank
from ..ops.low_rank_linear import Run
from ..targets.modules import Modules, WrapperModule, evaluating
from ..targets.target import kind_of
from .adapter import Adapter, LowRank, Parts, Replace
from .state import BASE, State
from .views import View

Stack = Sequence[Adapter]


class AdapterLayer(WrapperModule):
    """A module of the base model together with the adapters on it.

    Reads of unknown attributes fall through to the base module, writes of `weight` and `bias` too.
    """

    def __init__(self, base_layer: nn.Module, path: str, state: State) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = Modules()
        self.path = path
        self.state = state
        self.target = kind_of(base_layer)(self)
        self.merged_adapters: tuple[str, ...] = ()
        self.rows: Tensor | None = None
        self.call: dict[str, Any] = {}
        self.kept_module: nn.Module | None = None
        self.kept: dict[str, Tensor] = {}
        self.train(base_layer.training)

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if not state.enabled:
            return self._unadapted(*args, **kwargs)
        is_mixed = "adapter_names" in state.facts
        stack = () if is_mixed else self.stack(state.active)
        if not (is_mixed or stack):
            return self.base_layer(*args, **kwargs)
        if not is_mixed and self.target.kind != "block":
            return self._run(stack, args, kwargs)
        self.call = kwargs
        try:
            return (
                self._mixed(state.facts["adapter_names"], args, kwargs) if is_mixed else self._run(stack, args, kwargs)
            )
        finally:
            self.rows, self.call = None, {}

    def is_by_row(self) -> bool:
        """Whether the live adapters look at nothing but each row of the input, and draw no random numbers."""
        if "adapter_names" in self.state.facts:
            return False
        for adapter in self.stack(self.state.live()):
            is_plain = isinstance(adapter, LowRank) and type(adapter).post is LowRank.post
            drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in adapter.modules())
            if adapter.shared is not None or drops or not (is_plain or isinstance(adapter, Replace)):
                return False
        return True

    def stack(self, names: Sequence[str]) -> list[Adapter]:
        """The adapters of `names` on this layer that are not merged, innermost first."""
        adapters, merged = self.adapters._modules, self.merged_adapters
        return [part for name in names if name in adapters and name not in merged for part in adapters[name].parts]

    def _run(self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        below, above = _split(stack)
        x = _first(args, kwargs)
        suits = len(stack) == 1 and stack[0].is_dense and folded.suits(x, stack[0].dtype, self.target.dtype)
        if suits and (base := self.target.direct()) is not None:
            return folded.folded_linear(x, *base, stack[0].fold, list(stack[0].parameters()))
        direct = self._direct(x) if not below and above[0].is_product else None
        if direct is not None:
            inputs, x = _down(above[1:], x)
            y = self._updated(x, direct, above[:1], [(0, x.numel() // x.shape[-1], 0)])
            y = above[0].finish(_cast(y, above[0].dtype)) if above[0].has_finish else y
            return _cast(_up(above[1:], inputs, y), x.dtype)
        inputs, x = _down(above, x)
        args, kwargs = _with_first(x, args, kwargs)
        out = self._through(below, args, kwargs) if below else self.base_layer(*args, **kwargs)
        return _with_output(out, _up(above, inputs, _output(out)))

    def _direct(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The weight and bias of the base, where it and a low-rank update of it can be computed in one."""
        direct = self.target.direct() if is_fast("low_rank_linear") else None
        if direct is None or x.dtype != direct[0].dtype or is_autocast(x.device.type):
            return None
        return direct

    def _updated(self, x: Tensor, direct: tuple[Tensor, Tensor | None], products: Stack, runs: Sequence[Run]) -> Tensor:
        """The base with low-rank updates by runs of rows. What needs no gradient is put together once a call."""
        memo = None if torch.is_grad_enabled() else self.state.memo
        key = (self.path, tuple(id(adapter) for adapter in products), tuple(runs))
        if memo is not None and key not in memo:
            memo[key] = low_rank.stack([a.as_update() for a in products], runs, x.numel() // x.shape[-1], x.dtype)
        if memo is not None and memo[key] is not None:
            return low_rank.stacked_linear(x, *direct, memo[key])
        return low_rank.low_rank_linear(x, *direct, [a.as_update() for a in products], runs)

    def _mixed_products(self, names: Sequence[str], x: Tensor) -> Tensor | None:
        """A mixed batch in which every row has a low-rank update or none; None for others."""
        stacks = {name: self.stack((name,)) for name in dict.fromkeys(names) if name != BASE}
        own = {name: stack[0] for name, stack in stacks.items() if stack}
        rows = x.numel() // x.shape[-1]
        by_row = x.shape[0] == len(names) or (x.dim() == 2 and rows % len(names) == 0)
        if not own or not by_row or not all(len(s) < 2 and all(map(_is_sum, s)) for s in stacks.values()):
            return None
        direct = self._direct(x)
        return None if direct is None else self._updated(x, direct, list(own.values()), _runs(names, list(own), rows))

    def _mixed(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One batch whose rows use different adapters; the base module still runs once."""
        x = _first(args, kwargs)
        y = self._mixed_products(names, x)
        if y is not None:
            return y
        runs = []
        for rows, stack in self._groups(names, x):
            below, above = _split(stack)
            self.rows = rows
            inputs, own = _down(above, x[rows])
            x = x.index_copy(0, rows, own) if any(a.has_pre for a in above) else x
            runs.append((rows, below, above, inputs))
        args, kwargs = _with_first(x, args, kwargs)
        out = self.base_layer(*args, **kwargs)
        for rows, below, above, inputs in runs:
            self.rows = rows
            out = _with_rows(out, self._through(below, args, kwargs), rows) if below else out
            if above:
                y = _output(out)
                out = _with_output(out, y.index_copy(0, rows, _up(above, inputs, y[rows])))
        return out

    def _groups(self, names: Sequence[str], x: Tensor) -> list[tuple[Tensor, Stack]]:
        """The rows of a mixed batch that each adapter on this layer serves."""
        tokens = x.shape[0] // len(names) if x.dim() == 2 and x.shape[0] % len(names) == 0 else 1
        rows: dict[str, list[int]] = {}  # of (rows x tokens, width) where a mixture of experts flattened them
        for row, name in enumerate(name for name in names for _ in range(tokens)):
            rows.setdefault(name, []).append(row)
        stacks = {name: self.stack((name,)) for name in rows if name != BASE}
        if any(stacks.values()) and x.shape[0] != len(names) * tokens:
            raise VeneerError(
                f"adapter_names has {len(names)} entries, but {self.path!r} was given {x.shape[0]} rows: "
                "a mixed batch needs modules that keep the batch as their first dimension"
            )
        return [(torch.tensor(rows[name], device=x.device), stack) for name, stack in stacks.items() if stack]

    def _through(self, below: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output through the weight that the adapters `below` fold into."""
        if isinstance(below[-1], Replace):
            args, kwargs = _with_first(_cast(_first(args, kwargs), below[-1].dtype), args, kwargs)
            out = below[-1].run(*args, **kwargs)
            return _with_output(out, _cast(_output(out), self.target.dtype))
        if any(adapter.target.kind == "param" for adapter in below):
            return functional_call(self.base_layer, self.folded(below), args, kwargs)
        W, b = self.fold(below)
        return self.target.op(_first(args, kwargs), W, b)

    def folded(self, stack: Stack) -> dict[str, Tensor]:
        """The module's parameters with `stack` folded in, by name."""
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(adapter.target.path for adapter in stack):
            same = [adapter for adapter in stack if adapter.target.path == path]
            found |= same[0].target.tensors(*self.fold(same))
        return found

    def fold(self, stack: Stack) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias with `stack`, of one target, folded in: summed in at least fp32, rounded once."""
        target = stack[0].target
        W, b = target.weight(), target.bias()
        dtype, wide = W.dtype, torch.promote_types(W.dtype, torch.float32)
        W, b = W.to(wide), None if b is None else b.to(wide)
        for adapter in stack:
            W, b = adapter.fold(W, b)
        return W.to(dtype), None if b is None else b.to(dtype)

    def _unadapted(self, *args: Any, **kwargs: Any) -> Any:
        """The pretrained module, also while adapters are merged into its weight."""
        module = self.kept_module or self.base_layer
        return self.target.call_with(module, self.kept, args, kwargs) if self.kept else module(*args, **kwargs)

    # Merging

    def check_merge(self, names: Sequence[str]) -> None:
        """Raise NotMergeable unless merging `names` leaves the output as it is."""
        for name in names:
            for part in self.stack((name,)):
                if not part.has_fold:
                    part.fold(torch.empty(0), None)
        waiting = [n for n in self.state.active if n in self.adapters and n not in (*names, *self.merged_adapters)]
        for name in (n for n in names if n in self.adapters and n in self.state.active):
            order = self.state.active
            for first in (n for n in waiting if order.index(n) < order.index(name)):
                if not all(p.commutes for n in (first, name) for p in self.adapters[n].parts):
                    raise NotMergeable(
                        f"adapter {name!r} acts after {first!r} on {self.path!r}, and the two do not commute: "
                        f"merge {first!r} first, or both"
                    )

    def merge(self, names: Sequence[str], safe: bool = False) -> None:
        """Fold adapters into the weight, keeping the Parameters (and a replaced module) for `unmerge`."""
        stack = self.stack(names)
        whole = max((i for i, part in enumerate(stack) if isinstance(part, Replace)), default=-1)
        if whole >= 0:
            self._swap(stack[whole].module)
        rest = stack[whole + 1 :]
        if rest:
            with evaluating(*rest):
                new = self.folded(rest)
            if safe and not all(torch.isfinite(t).all() for t in new.values()):
                raise NotMergeable(f"merging {', '.join(names)} into {self.path!r} gives values that are not finite")
            old = self.target.replace(new)
            self.kept = self.kept if self.kept_module else {**old, **self.kept}
        self.merged_adapters += tuple(n for n in names if n in self.adapters and n not in self.merged_adapters)

    def is_summed(self, names: Sequence[str]) -> bool:
        """Merging `names` is adding low-rank updates to the weight."""
        stack = self.stack(names)
        is_sum = all(isinstance(adapter, LowRank) and adapter.is_plain_sum for adapter in stack)
        return bool(stack) and is_sum and self.target.direct() is not None

    @torch.no_grad()
    def merge_in_place(self, names: Sequence[str], safe: bool = False) -> None:
        """The merge of a layer that `is_summed`, into the Parameter itself: a sum in at least fp32, rounded once.

        In new memory: where the weight is mapped from a file, each page that is written is copied first, which takes
        nine times as long.
        """
        W, stack = self.target.weight(), self.stack(names)
        wide = torch.promote_types(W.dtype, torch.float32)
        with evaluating(*stack):
            A, B = zip(*(adapter.factors() for adapter in stack), strict=True)  # type: ignore[operator]
        merged = torch.addmm(W.to(wide), torch.cat(B, dim=1).to(wide), torch.cat(A).to(wide)).to(W.dtype)
        self.base_layer.weight.data = self.target.as_stored(merged).contiguous()
        self.merged_adapters += tuple(n for n in names if n in self.adapters and n not in self.merged_adapters)

    def _swap(self, replacement: nn.Module) -> None:
        """Put the trained copy of the module in its place; the weights merged into the old one go back first."""
        self.target.restore(self.kept)
        self.kept = {}
        self.kept_module = self.kept_module or self.base_layer
        self.base_layer = copy.deepcopy(replacement).requires_grad_(False).to(self.target.dtype)

    def unmerge(self) -> None:
        """Bind the kept Parameters back: bit-exact for every method and dtype."""
        if self.kept_module is not None:
            self.base_layer, self.kept_module = self.kept_module, None
        self.target.restore(self.kept)
        self.kept = {}
        self.merged_adapters = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A move or a cast takes along what `unmerge` binds back."""
        holder = nn.Module()
        holder._parameters.update(self.kept)  # type: ignore[arg-type]
        self.kept = dict(holder._apply(fn)._parameters)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)

    def snapshot(self) -> tuple[Any, ...]:
        """What `merge` changes, for `revert`."""
        base = self.base_layer
        return base, self.target.parameters(), self.kept_module, self.kept, self.merged_adapters

    def revert(self, snapshot: tuple[Any, ...]) -> None:
        self.base_layer, parameters, self.kept_module, self.kept, self.merged_adapters = snapshot
        self.target.restore(parameters)

    # Holding adapters

    def add(self, name: str, adapter: Adapter) -> None:
        """Put an adapter on; a second one under the same name composes with the first."""
        present = self.adapters.get(name)
        self.adapters[name] = adapter if present is None else Parts(present, adapter)

    # Standing in for the base module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
        if name == "weight" and self.state.watch is not None:
            self.state.watch.add(self.path)
        try:
            return getattr(base, name)
        except AttributeError:
            view = View(self, name)
            if name.startswith("__") or not len(view):
                raise
            return view

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        first, *rest = repr(self.base_layer).split("\n")
        notes = [
            f" + {type(a).__name__}[{name}]({a.describe()}){' merged' if name in self.merged_adapters else ''}"
            for name, a in self.adapters.items()
        ]
        return "\n".join([first, *rest]) + "".join(notes)


def _is_sum(adapter: Adapter) -> bool:
    return adapter.is_product and not adapter.has_finish


def _runs(names: Sequence[str], known: Sequence[str], rows: int) -> list[Run]:
    """Where in a matrix of so many rows the runs of a mixed batch are whose names are known."""
    each, place, found = rows // len(names), 0, []
    for name, group in itertools.groupby(names):
        start, place = place, place + each * len(list(group))
        if name in known:
            found.append((start, place, known.index(name)))
    return found


def _split(stack: Stack) -> tuple[Stack, Stack]:
    """What must go through the weight (a weight form only, or above others and reading their weight), and the rest."""
    k = 0
    for i, adapter in enumerate(stack):
        only_folds = adapter.target.kind == "param" or not (adapter.has_pre or adapter.has_post)
        if only_folds or (adapter.reads_weight and i > 0):
            k = i + 1
    return stack[:k], stack[k:]


def _down(above: Stack, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """`pre` from the outermost adapter in. Returns what each received, innermost last, and x in its own dtype."""
    inputs, dtype = [], x.dtype
    for adapter in reversed(above):
        x = _cast(x, adapter.dtype)
        inputs.append(x)
        if adapter.has_pre:
            x = adapter.pre(x)
    return inputs, _cast(x, dtype)


def _up(above: Stack, inputs: list[Tensor], y: Tensor) -> Tensor:
    """`post` from the innermost adapter out, each in its own dtype; the result in the base's."""
    dtype = y.dtype
    for adapter, x in zip(above, reversed(inputs), strict=True):
        if adapter.has_post:
            y = adapter.post(x, _cast(y, adapter.dtype))
    return _cast(y, dtype)


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t if dtype is None or t.dtype == dtype or not t.is_floating_point() else t.to(dtype)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor a module transforms: its first positional one, else its first keyword (attention blocks)."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _with_first(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], x, *args[i + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: x}


def _with_rows(out: Any, other: Any, rows: Tensor) -> Any:
    """A module's output with some rows taken from another call, in each tensor that has rows."""
    if isinstance(out, tuple):
        return tuple(_with_rows(a, b, rows) for a, b in zip(out, other, strict=True))
    same = isinstance(out, Tensor) and out.dim() > 0 and out.shape == other.shape
    return out.index_copy(0, rows, other[rows].to(out.dtype)) if same else out


def _output(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _with_output(out: Any, y: Tensor) -> Any:
    return (y, *out[1:]) if isinstance(out, tuple) else y
