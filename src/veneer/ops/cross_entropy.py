"""Cross-entropy of a language model's head, of supervised positions only, in chunks: full logits never exist.

    loss = sum_i logsumexp(z_i) - z_i[t_i],  z_i = f(W h_i + b),  over positions whose label t_i is not ignored

For the length of a training call with labels the model's head is lent a `forward` that gives `Logits`: a tensor that
is not computed yet. The model's own code goes on as ever, whatever it is: scaling, soft-capping, casts, shifts and
reshapes are noted, and `torch.nn.functional.cross_entropy` on the outcome is computed here. Whatever else touches the
tensor gets the true values, graph and all, so `outputs.logits` can still be read.

The gradient of a chunk is computed in the forward pass, as in Liger (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as plain_cross_entropy
from torch.utils._pytree import tree_map_only

from ..errors import VeneerError
from . import is_autocast, is_fast
from ._conditions import takes_part

CHUNK_BYTES = 64 << 20
"""Of fp32 logits at a time: smaller reads the weight more often, larger leaves the caches (measured, 49,152 tokens)."""
SAME_SHAPE = {"float", "to", "div", "true_divide", "__truediv__", "mul", "__mul__", "__rmul__", "tanh", "contiguous"}
"""Operations on each logit by itself, with numbers and dtypes as their only other arguments."""
MOVING = {"view", "reshape", "flatten", "__getitem__"}
"""Operations that may leave the last dimension as it is; such a one is done to the hidden states."""
FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "ndimension")),
}
"""What can be known of logits without computing them."""
Step = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]
Loss = tuple[Tensor, Tensor, tuple[Tensor, ...]]


class Logits(Tensor):
    """The logits of `hidden` (..., in), (..., vocabulary), before they are computed."""

    hidden: Tensor
    steps: tuple[Step, ...]
    head: Head
    origin: tuple[Logits, Step] | None
    value: Tensor | None

    @staticmethod
    def __new__(cls, head: Head, hidden: Tensor, steps: tuple[Step, ...] = (), origin: Any = None) -> Logits:
        dtype = _after(torch.empty(0, dtype=head.dtype), steps).dtype
        shape = (*hidden.shape[:-1], head.width)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        self.head, self.hidden, self.steps, self.origin, self.value = head, hidden, steps, origin, None
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]  # made anew at each look
            return True
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, Logits) and not first.is_computed():
            if func is plain_cross_entropy:
                loss = _fast(first, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
            else:
                loss = first.later(func, args[1:], kwargs)
            if loss is not None:
                return loss
        return func(*whole(args), **whole(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*whole(args), **whole(kwargs or {}))

    def is_computed(self) -> bool:
        return self.value is not None or (self.origin is not None and self.origin[0].is_computed())

    def later(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Logits | None:
        """The same operation on logits to be computed; None where it needs them now."""
        name, step = getattr(func, "__name__", ""), (func, args, kwargs)
        if name in SAME_SHAPE and all(isinstance(a, (int, float, torch.dtype)) for a in (*args, *kwargs.values())):
            return Logits(self.head, self.hidden, (*self.steps, step), (self, step))
        if name in MOVING and not kwargs:
            hidden = _moved(name, self.hidden, self.head.width, args)
            return None if hidden is None else Logits(self.head, hidden, self.steps, (self, step))
        return None

    def compute(self) -> Tensor:
        """The true logits, with their graph."""
        if self.value is None and self.origin is not None:
            parent, (func, args, kwargs) = self.origin
            self.value = func(parent.compute(), *args, **kwargs)
        elif self.value is None:
            self.value = self.head.all_at_once(self.hidden)
        return self.value

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Logits({tuple(self.shape)}, not computed)" if not self.is_computed() else repr(self.compute())


class Head:
    """A model's head in one call: the module, and the state in which it was called."""

    def __init__(self, module: nn.Module, width: int, weight: Tensor) -> None:
        self.module, self.forward, self.width = module, module.forward, width
        self.learned = tuple(p for p in module.parameters() if p.requires_grad)
        self.device = weight.device.type
        self.autocast = is_autocast(self.device)
        self.dtype = torch.get_autocast_dtype(self.device) if self.autocast else weight.dtype
        self.is_frozen = type(module) is nn.Linear and not self.learned and not self.autocast
        self.seen = self._now()

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a frozen linear layer."""
        module: Any = self.module
        return module.weight, module.bias

    def _now(self) -> tuple[Any, ...]:
        state = getattr(self.module, "state", None)
        adapters = (state.active, state.enabled) if state is not None else ()
        return (*adapters, *((id(p), p._version) for p in self.module.parameters()))

    def __call__(self, hidden: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=self.dtype if self.autocast else None, enabled=self.autocast):
            return self.forward(hidden)

    def all_at_once(self, hidden: Tensor) -> Tensor:
        """Logits as the call would have given them.

        Raises:
            VeneerError: weights or active adapters are others by now.
        """
        if self._now() != self.seen:
            raise VeneerError(
                "the logits of a training call were read after its head had changed (an optimizer step, another "
                "adapter); read outputs.logits before that, or switch off the fast path: VENEER_PLAIN=cross_entropy"
            )
        with torch.enable_grad():
            return self(hidden)


class _Sum(torch.autograd.Function):
    """The summed loss of hidden states (n, in) and their labels (n,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: Head, steps: Any, smoothing: float, *_: Tensor
    ) -> Tensor:
        total, grad, grads = _in_chunks(hidden, labels, head, steps, smoothing)
        ctx.save_for_backward(grad, *grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grad, *grads = (g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return grad, None, None, None, None, *grads


def linear_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    steps: tuple[Step, ...] = (),
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of the logits that `head`, then `steps`, make of hidden states (n, in); a scalar.

    Args:
        labels: (n,); where they are `ignore_index`, nothing is computed.
        reduction: "mean" over supervised positions, or "sum".
    """
    kept = _supervised(labels, ignore_index)
    picked = hidden if len(kept) == len(labels) else hidden.index_select(0, kept)
    total = _Sum.apply(picked, labels[kept], head, steps, label_smoothing, *head.learned)
    return total / torch.tensor(len(kept), dtype=total.dtype) if reduction == "mean" else total


def _supervised(labels: Tensor, ignore_index: int) -> Tensor:
    """Positions of labels (n,) that are learned; all of them on the meta device, where labels have no values."""
    if labels.is_meta:
        return torch.arange(len(labels), device=labels.device)
    return (labels != ignore_index).nonzero().squeeze(1)


def reference(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], steps: tuple[Step, ...] = (), **kwargs: Any
) -> Tensor:
    """The same, the plain way."""
    return plain_cross_entropy(_after(head(hidden), steps), labels, **kwargs)


def _in_chunks(hidden: Tensor, labels: Tensor, head: Head, steps: Any, smoothing: float) -> Loss:
    """Summed loss, its gradient in hidden, and in what the head learns."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad, grads = torch.empty_like(hidden), tuple(torch.zeros_like(p) for p in head.learned)
    size = max(1, CHUNK_BYTES // (4 * head.width))
    one = _frozen_chunk if head.is_frozen else _module_chunk
    for h, t, out in zip(hidden.split(size), labels.split(size), grad.split(size), strict=True):
        loss, own, learned = one(h, t, head, steps, smoothing)
        total += loss
        out.copy_(own)
        for whole_grad, part in zip(grads, learned, strict=True):
            whole_grad += part
    return total, grad, grads


def _frozen_chunk(h: Tensor, t: Tensor, head: Head, steps: Any, smoothing: float) -> Loss:
    """A frozen linear head."""
    W, b = head.parameters()
    z = torch.nn.functional.linear(h, W, b)
    if all(func.__name__ in ("float", "to", "contiguous") for func, *_ in steps):
        loss, dz = _gradient(z.float(), t, smoothing)
        return loss, dz.to(W.dtype) @ W, ()
    z.requires_grad_()
    with torch.enable_grad():
        y = _after(z, steps)
    loss, dy = _gradient(y.detach().float(), t, smoothing)
    (dz,) = torch.autograd.grad(y, z, dy.to(y.dtype))
    return loss, dz @ W, ()


def _gradient(z: Tensor, t: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (n, vocabulary), and its gradient: softmax minus target.

    By torch's log_softmax, whose rounding the plain path has too: a more exact sum of the exponentials (its error here
    is 1e-5) would set first gradients 1e-4 apart from the plain path's.
    """
    p = z.log_softmax(1)
    own = p.gather(1, t[:, None])
    loss = -own if not smoothing else (smoothing - 1) * own - smoothing * p.mean(1, keepdim=True)
    p.exp_()
    if smoothing:
        p.sub_(smoothing / z.shape[1])
    p.scatter_add_(1, t[:, None], torch.full_like(own, smoothing - 1))
    return loss.sum(), p


def _module_chunk(h: Tensor, t: Tensor, head: Head, steps: Any, smoothing: float) -> Loss:
    """Any head: through the module, with autograd."""
    h = h.detach().requires_grad_()
    with torch.enable_grad():
        z = _after(head(h), steps).float()
        loss = plain_cross_entropy(z, t, reduction="sum", label_smoothing=smoothing)
    own, *learned = torch.autograd.grad(loss, (h, *head.learned), allow_unused=True, materialize_grads=True)
    return loss.detach(), own, tuple(learned)


def _fast(
    logits: Logits,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`torch.nn.functional.cross_entropy` of logits not computed yet; None for what it offers beyond this file."""
    deprecated = weight is not None or size_average is not None or reduce is not None
    if deprecated or reduction == "none" or logits.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return None
    loss = linear_cross_entropy(
        logits.hidden,
        target,
        logits.head,
        logits.steps,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss if logits.head.autocast else loss.to(logits.dtype)


def whole(tree: Any) -> Any:
    """A tree of arguments with the true logits in it."""
    return tree_map_only(Logits, Logits.compute, tree)


def _after(t: Tensor, steps: tuple[Step, ...]) -> Tensor:
    for func, args, kwargs in steps:
        t = func(t, *args, **kwargs)
    return t


def _moved(name: str, hidden: Tensor, width: int, args: tuple[Any, ...]) -> Tensor | None:
    """Hidden states after an operation on logits that keeps the last dimension whole; None for another."""
    if name == "flatten":
        return hidden.flatten(*args) if args == (0, hidden.dim() - 2) or args == (0, -2) else None
    if name == "__getitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        to_last = Ellipsis in index or len(index) == hidden.dim()
        ok = all(i is Ellipsis or isinstance(i, slice) for i in index) and index.count(Ellipsis) <= 1
        return hidden[index] if ok and (not to_last or index[-1] in (slice(None), Ellipsis)) else None
    shape = tuple(args[0]) if isinstance(args[0], (tuple, list)) else args
    return hidden.reshape(*shape[:-1], hidden.shape[-1]) if len(shape) > 1 and shape[-1] == width else None


# On a model


def lend(model: Any, kwargs: dict[str, Any]) -> None:
    """Let the model's head give `Logits` for the length of a training call."""
    learns = kwargs.get("labels") is not None and takes_part(model)
    if not learns or not is_fast("cross_entropy"):
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not _can_be_lent(model, head):
        return
    weight = head.weight
    own = Head(head, weight.shape[0], weight)
    head.__dict__["forward"] = lambda hidden: Logits(own, hidden)
    model.__dict__["_veneer_lent"] = head


def take_back(model: Any) -> None:
    head = model.__dict__.pop("_veneer_lent", None)
    if head is not None:
        head.__dict__.pop("forward", None)


def _can_be_lent(model: Any, head: nn.Module) -> bool:
    """Whether the head is a linear layer, adapted or not, that gives the same whenever it is asked, row by row."""
    base = getattr(head, "base_layer", head)
    weight = base._parameters.get("weight")
    is_whole = type(weight) is nn.Parameter and not any(hasattr(weight, n) for n in ("ds_id", "_fsdp_flattened"))
    modules = (head, base)
    is_sharded = any(kind.__name__ == "FSDPModule" for m in (model, *modules) for kind in type(m).__mro__)
    has_hooks = any(m._forward_hooks or m._backward_hooks or _meddles(m) for m in modules)
    own_forward = any("forward" in m.__dict__ for m in modules)
    ok = type(base) is nn.Linear and is_whole and not (is_sharded or has_hooks or own_forward)
    return ok and (head is base or head.is_by_row())


def _meddles(module: nn.Module) -> bool:
    """Whether a hook may change what a module is given; one whose owner says that it `only_looks` does not."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return not all(getattr(owner, "only_looks", False) for owner in owners)
