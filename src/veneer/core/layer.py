"""`AdapterLayer`, the only wrapper: it runs the active adapters of any method around one module, in a fixed order.

Adapters compose in this order: `pre` from the outermost adapter to the innermost, the base module once, then `post`
from the innermost to the outermost. `fold` is applied from the innermost outwards too, so merging keeps the output.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import NotMergeable, TargetError, VeneerError
from ..maths.precision import HALF
from ..ops import folded_linear as folded
from ..ops import is_autocast, is_fast
from ..ops import low_rank_linear as low_rank
from ..ops.low_rank_linear import Run
from ..targets.modules import Modules, WrapperModule, evaluating
from ..targets.target import kind_of
from .adapter import Adapter, LowRank, Parts, Replace
from .state import Row, State, adapters_of
from .views import View

Stack = Sequence[Adapter]
"""Adapters on one layer, innermost first."""


class Group(NamedTuple):
    """The rows of a mixed batch that use the same adapter name."""

    rows: Tensor
    below: Stack
    """Adapters that are folded into the weight."""
    above: Stack
    inputs: list[Tensor]
    """The input of each adapter in `above`, innermost last."""


class Snapshot(NamedTuple):
    """The state of a layer before a merge."""

    base_layer: nn.Module
    parameters: dict[str, Tensor]
    kept_module: nn.Module | None
    kept: dict[str, Tensor]
    merged_adapters: tuple[str, ...]


class AdapterLayer(WrapperModule):
    """A module of the base model together with the adapters on it.

    Attributes that it lacks are read from the base module, and assignments to `weight` and `bias` go to it.
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
            if is_mixed:
                return self._mixed(state.facts["adapter_names"], args, kwargs)
            return self._run(stack, args, kwargs)
        finally:
            self.rows = None
            self.call = {}

    def is_by_row(self) -> bool:
        """Whether the active adapters process each row of the input independently, and draw no random numbers."""
        if "adapter_names" in self.state.facts:
            return False
        for adapter in self.stack(self.state.live()):
            is_plain = isinstance(adapter, LowRank) and type(adapter).post is LowRank.post
            drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in adapter.modules())
            if adapter.shared is not None or drops or not (is_plain or isinstance(adapter, Replace)):
                return False
        return True

    def stack(self, names: Sequence[str]) -> list[Adapter]:
        """The unmerged adapters called `names` on this layer, innermost first."""
        adapters, merged = self.adapters._modules, self.merged_adapters
        stack: list[Adapter] = []
        for name in names:
            if name in adapters and name not in merged:
                stack += adapters[name].parts  # type: ignore[arg-type, union-attr]
        return stack

    def _run(self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the base module with the same stack of adapters for all rows."""
        x = _first(args, kwargs)
        if len(stack) == 1 and stack[0].is_dense and folded.suits(x, stack[0].dtype, self.target.dtype):
            base = self.target.direct()
            if base is not None:
                return folded.folded_linear(x, *base, stack[0].fold, list(stack[0].parameters()))
        below, above = _split(stack)
        if not below and above[0].is_product:
            base = self._direct(x)
            if base is not None:
                return self._fused(above, x, base)
        if not below and x.dtype in HALF and all(adapter.only_adds for adapter in above):
            base = self._direct(x)
            if base is not None:
                return self._added(above, x, base)
        inputs, x = _down(above, x)
        args, kwargs = _with_first(x, args, kwargs)
        out = self._through(below, args, kwargs) if below else self.base_layer(*args, **kwargs)
        if self.target.by_weight and above:
            self._check_width(_output(out), above[0])
        return _with_output(out, _up(above, inputs, _output(out)))

    def _added(self, stack: Stack, x: Tensor, base: tuple[Tensor, Tensor | None]) -> Tensor:
        """Run adapters that only add to the output, so that in half precision it is rounded once."""
        innermost: Any
        innermost, *outer = stack
        update = innermost.term(_cast(x, innermost.dtype))
        for adapter in outer:
            update = update + adapter.term(_cast(x, adapter.dtype))  # type: ignore[attr-defined]
        return low_rank.with_base(_cast(update, x.dtype), x, *base)

    def _check_width(self, y: Tensor, adapter: Adapter) -> None:
        """Raise if a module with a forward of its own gives activations that a method for its class cannot change."""
        target = self.target
        if target.kind == "linear" and y.shape[-1] != target.out_features:
            raise TargetError(
                f"{self.path!r} ({type(self.base_layer).__name__}) has a forward of its own, which gives "
                f"{y.shape[-1]} features instead of {target.out_features}, so {type(adapter).__name__} has no form on "
                "it; leave it out with exclude_modules"
            )

    def _fused(self, stack: Stack, x: Tensor, base: tuple[Tensor, Tensor | None]) -> Tensor:
        """Run a stack whose innermost adapter is a low-rank update, which is computed together with the base."""
        innermost, outer = stack[0], stack[1:]
        inputs, x = _down(outer, x)
        rows = x.numel() // x.shape[-1]
        y = self._updated(x, base, [innermost], [(0, rows, 0)])
        if innermost.has_finish:
            y = innermost.finish(_cast(y, innermost.dtype))
        return _cast(_up(outer, inputs, y), x.dtype)

    def _direct(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The weight and bias of the base if a low-rank update can be computed together with it; else None."""
        direct = self.target.direct() if is_fast("low_rank_linear") else None
        if direct is None or x.dtype != direct[0].dtype or is_autocast(x.device.type):
            return None
        return direct

    def _updated(self, x: Tensor, base: tuple[Tensor, Tensor | None], products: Stack, runs: Sequence[Run]) -> Tensor:
        """The output of the base plus low-rank updates, each of which applies to runs of rows.

        Without gradients, and while no adapter changes (`State.memo`), the stacked factors are cached between calls.
        """
        memo = None if torch.is_grad_enabled() else self.state.memo
        if memo is not None:
            key = (self.path, tuple(id(adapter) for adapter in products), tuple(runs))
            if key not in memo:
                updates = [adapter.as_update() for adapter in products]
                memo[key] = low_rank.stack(updates, runs, x.numel() // x.shape[-1], x.dtype)
            if memo[key] is not None:
                return low_rank.stacked_linear(x, *base, memo[key])
        updates = [adapter.as_update() for adapter in products]
        return low_rank.low_rank_linear(x, *base, updates, runs)

    def _mixed_products(self, names: Sequence[Row], x: Tensor) -> Tensor | None:
        """The output for a mixed batch in which each row has at most one low-rank update; None for other batches."""
        products: dict[Row, Adapter] = {}
        for row in dict.fromkeys(names):
            stack = self.stack(adapters_of(row))
            if len(stack) > 1 or not all(map(_is_sum, stack)):
                return None
            if stack:
                products[row] = stack[0]
        rows = x.numel() // x.shape[-1]
        has_rows = x.shape[0] == len(names) or (x.dim() == 2 and rows % len(names) == 0)
        base = self._direct(x) if products and has_rows else None
        if base is None:
            return None
        runs = _runs(names, list(products), rows)
        return self._updated(x, base, list(products.values()), runs)

    def _mixed(self, names: Sequence[Row], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a batch whose rows use different adapters. The base module runs once, for all rows."""
        x = _first(args, kwargs)
        y = self._mixed_products(names, x)
        if y is not None:
            return y
        groups = []
        for rows, stack in self._groups(names, x):
            below, above = _split(stack)
            self.rows = rows
            inputs, changed = _down(above, x[rows])
            if any(adapter.has_pre for adapter in above):
                x = x.index_copy(0, rows, changed)
            groups.append(Group(rows, below, above, inputs))
        args, kwargs = _with_first(x, args, kwargs)
        out = self.base_layer(*args, **kwargs)
        for group in groups:
            self.rows = group.rows
            if group.below:
                out = _with_rows(out, self._through(group.below, args, kwargs), group.rows)
            if group.above:
                y = _output(out)
                changed = _up(group.above, group.inputs, y[group.rows])
                out = _with_output(out, y.index_copy(0, group.rows, changed))
        return out

    def _groups(self, names: Sequence[Row], x: Tensor) -> list[tuple[Tensor, Stack]]:
        """(rows, adapters) for each entry of a mixed batch that has adapters here."""
        is_flat = x.dim() == 2 and x.shape[0] % len(names) == 0  # experts receive (rows x tokens, width)
        tokens = x.shape[0] // len(names) if is_flat else 1
        rows: dict[Row, list[int]] = {}
        for place, name in enumerate(names):
            rows.setdefault(name, []).extend(range(place * tokens, (place + 1) * tokens))
        stacks = {name: self.stack(adapters_of(name)) for name in rows}
        if any(stacks.values()) and x.shape[0] != len(names) * tokens:
            raise VeneerError(
                f"adapter_names has {len(names)} entries, but {self.path!r} received {x.shape[0]} rows; in a mixed "
                "batch, the first dimension of every adapted module's input must be the batch"
            )
        return [(torch.tensor(rows[name], device=x.device), stack) for name, stack in stacks.items() if stack]

    def _through(self, below: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with the adapters `below` folded into its weight."""
        outermost = below[-1]
        if isinstance(outermost, Replace):
            x = _cast(_first(args, kwargs), outermost.dtype)
            args, kwargs = _with_first(x, args, kwargs)
            out = outermost.run(*args, **kwargs)
            return _with_output(out, _cast(_output(out), self.target.dtype))
        if any(adapter.target.kind == "param" or adapter.target.by_weight for adapter in below):
            return functional_call(self.base_layer, self.folded(below), args, kwargs)
        W, b = self.fold(below)
        return self.target.op(_first(args, kwargs), W, b)

    def folded(self, stack: Stack) -> dict[str, Tensor]:
        """The module's parameters, by name, with the adapters in `stack` folded in."""
        by_path: dict[str, list[Adapter]] = {}
        for adapter in stack:
            by_path.setdefault(adapter.target.path, []).append(adapter)
        tensors: dict[str, Tensor] = {}
        for adapters in by_path.values():
            W, b = self.fold(adapters)
            tensors |= adapters[0].target.tensors(W, b)
        return tensors

    def fold(self, stack: Stack) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and bias of one target with its adapters folded in.

        Computed in at least float32, and rounded once at the end.
        """
        target = stack[0].target
        W, b = target.weight(), target.bias()
        dtype = W.dtype
        wide = torch.promote_types(dtype, torch.float32)
        W = W.to(wide)
        b = None if b is None else b.to(wide)
        for adapter in stack:
            W, b = adapter.fold(W, b)
        return W.to(dtype), None if b is None else b.to(dtype)

    def _unadapted(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the pretrained module, even while adapters are merged into its weight."""
        module = self.kept_module or self.base_layer
        if self.kept:
            return self.target.call_with(module, self.kept, args, kwargs)
        return module(*args, **kwargs)

    # Merging

    def check_merge(self, names: Sequence[str]) -> None:
        """Raise NotMergeable if merging `names` would change the output."""
        for name in names:
            for part in self.stack((name,)):
                if not part.has_fold:
                    part.fold(torch.empty(0), None)  # raises NotMergeable with the reason
        order = self.state.active
        merged = (*names, *self.merged_adapters)
        waiting = [name for name in order if name in self.adapters and name not in merged]
        for name in names:
            if name not in self.adapters or name not in order:
                continue
            for first in waiting:
                if order.index(first) < order.index(name) and not self._commute(first, name):
                    raise NotMergeable(
                        f"adapter {name!r} acts after {first!r} on {self.path!r}, and their order matters; merge "
                        f"{first!r} first, or both together"
                    )

    def _commute(self, *names: str) -> bool:
        """Whether the order of these adapters makes no difference on this layer."""
        return all(all(part.commutes for part in self.adapters[name].parts) for name in names)

    def merge(self, names: Sequence[str], safe: bool = False) -> None:
        """Fold adapters into the weight. The old Parameters, and a replaced module, are kept for `unmerge`."""
        stack = self.stack(names)
        for place in reversed(range(len(stack))):
            if isinstance(stack[place], Replace):
                self._swap(stack[place].module)
                stack = stack[place + 1 :]
                break
        if stack:
            self._bind_folded(stack, names, safe)
        self._note_merged(names)

    def _bind_folded(self, stack: Stack, names: Sequence[str], safe: bool) -> None:
        with evaluating(*stack):
            tensors = self.folded(stack)
        if safe and not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise NotMergeable(f"merging {', '.join(names)} into {self.path!r} gives values that are not finite")
        replaced = self.target.replace(tensors)
        if self.kept_module is None:
            self.kept = {**replaced, **self.kept}

    def _note_merged(self, names: Sequence[str]) -> None:
        self.merged_adapters += tuple(n for n in names if n in self.adapters and n not in self.merged_adapters)

    def is_summed(self, names: Sequence[str]) -> bool:
        """Whether merging `names` only adds low-rank updates to the weight."""
        stack = self.stack(names)
        is_sum = all(isinstance(adapter, LowRank) and adapter.is_plain_sum for adapter in stack)
        return bool(stack) and is_sum and self.target.direct() is not None

    @torch.no_grad()
    def merge_in_place(self, names: Sequence[str], safe: bool = False) -> None:
        """Merge into the Parameter itself, on a layer that `is_summed`: a sum in at least float32, rounded once.

        The result is in new memory: if the weight is mapped from a file, writing to it would copy each page first,
        which takes nine times as long.
        """
        W = self.target.weight()
        wide = torch.promote_types(W.dtype, torch.float32)
        stack = self.stack(names)
        with evaluating(*stack):
            factors = [adapter.factors() for adapter in stack]  # type: ignore[operator]
        A = torch.cat([down for down, _ in factors]).to(wide)  # (sum of ranks, in)
        B = torch.cat([up for _, up in factors], dim=1).to(wide)  # (out, sum of ranks)
        merged = torch.addmm(W.to(wide), B, A).to(W.dtype)
        self.base_layer.weight.data = self.target.as_stored(merged).contiguous()
        self._note_merged(names)

    def _swap(self, replacement: nn.Module) -> None:
        """Replace the module by its trained copy, after undoing what was merged into the old module."""
        self.target.restore(self.kept)
        self.kept = {}
        self.kept_module = self.kept_module or self.base_layer
        self.base_layer = copy.deepcopy(replacement).requires_grad_(False).to(self.target.dtype)

    def unmerge(self) -> None:
        """Restore the Parameters that `merge` kept: bit-exact for every method and dtype."""
        if self.kept_module is not None:
            self.base_layer = self.kept_module
            self.kept_module = None
        self.target.restore(self.kept)
        self.kept = {}
        self.merged_adapters = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and cast the kept Parameters as well."""
        holder = nn.Module()
        holder._parameters.update(self.kept)  # type: ignore[arg-type]
        self.kept = dict(holder._apply(fn)._parameters)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)

    def snapshot(self) -> Snapshot:
        """Record everything that `merge` changes, for `revert`."""
        parameters = self.target.parameters()
        return Snapshot(self.base_layer, parameters, self.kept_module, self.kept, self.merged_adapters)

    def revert(self, snapshot: Snapshot) -> None:
        """Undo all merges since the snapshot."""
        self.base_layer = snapshot.base_layer
        self.kept_module = snapshot.kept_module
        self.kept = snapshot.kept
        self.merged_adapters = snapshot.merged_adapters
        self.target.restore(snapshot.parameters)

    # Holding adapters

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter; a second one with the same name is composed with the first."""
        present = self.adapters.get(name)
        self.adapters[name] = adapter if present is None else Parts(present, adapter)

    # Attributes of the base module

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
        lines = repr(self.base_layer)
        for name, adapter in self.adapters.items():
            merged = " merged" if name in self.merged_adapters else ""
            lines += f" + {type(adapter).__name__}[{name}]({adapter.describe()}){merged}"
        return lines


def _is_sum(adapter: Adapter) -> bool:
    return adapter.is_product and not adapter.has_finish


def _runs(names: Sequence[Row], adapted: Sequence[Row], rows: int) -> list[Run]:
    """The runs of consecutive rows with the same name in a mixed batch, for the names in `adapted`.

    A run is (first row, end, index of the name in `adapted`), in rows of a matrix that has `rows` in total.
    """
    rows_each = rows // len(names)
    start = 0
    runs = []
    for name, group in itertools.groupby(names):
        end = start + rows_each * len(list(group))
        if name in adapted:
            runs.append((start, end, adapted.index(name)))
        start = end
    return runs


def _split(stack: Stack) -> tuple[Stack, Stack]:
    """(adapters that must be folded into the weight, adapters above them).

    An adapter must be folded if it is only defined as a change of the weight, if it reads the weight and has adapters
    below it, or if it updates the weight of a module with a forward of its own. All adapters below such an adapter are
    folded as well.
    """
    count = 0
    for place, adapter in enumerate(stack):
        target = adapter.target
        is_update = target.by_weight and adapter.has_fold
        only_folds = target.kind == "param" or is_update or not (adapter.has_pre or adapter.has_post)
        if only_folds or (adapter.reads_weight and place > 0):
            count = place + 1
    return stack[:count], stack[count:]


def _down(above: Stack, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Apply `pre`, outermost adapter first. Returns (each adapter's input, innermost last; x in its original dtype)."""
    inputs = []
    dtype = x.dtype
    for adapter in reversed(above):
        x = _cast(x, adapter.dtype)
        inputs.append(x)
        if adapter.has_pre:
            x = adapter.pre(x)
    return inputs, _cast(x, dtype)


def _up(above: Stack, inputs: list[Tensor], y: Tensor) -> Tensor:
    """Apply `post`, innermost adapter first, each in its own dtype. The result has the dtype of y."""
    dtype = y.dtype
    for adapter, x in zip(above, reversed(inputs), strict=True):
        if adapter.has_post:
            y = adapter.post(x, _cast(y, adapter.dtype))
    return _cast(y, dtype)


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or t.dtype == dtype or not t.is_floating_point():
        return t
    return t.to(dtype)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module transforms: the first positional one, else the first keyword one (attention blocks)."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _with_first(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with x in place of the tensor that `_first` returns."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:place], x, *args[place + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: x}


def _with_rows(out: Any, other: Any, rows: Tensor) -> Any:
    """A module's output with the given rows taken from the output of another call, in each batched tensor."""
    if isinstance(out, tuple):
        return tuple(_with_rows(a, b, rows) for a, b in zip(out, other, strict=True))
    if isinstance(out, Tensor) and out.dim() > 0 and out.shape == other.shape:
        return out.index_copy(0, rows, other[rows].to(out.dtype))
    return out


def _output(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _with_output(out: Any, y: Tensor) -> Any:
    return (y, *out[1:]) if isinstance(out, tuple) else y
