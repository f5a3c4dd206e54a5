"""Cross-entropy of a language model's head, for supervised positions only and in chunks, without the full logits.

    loss = sum_i logsumexp(z_i) - z_i[t_i],  z_i = f(W h_i + b),  over positions whose label t_i is not ignored

During a training call with labels, the `forward` of the model's head returns `Logits`: a tensor that is not computed
yet. The model's own code runs unchanged. Scaling, soft-capping, casts, shifts and reshapes of the logits are recorded,
and `torch.nn.functional.cross_entropy` of the result is computed here. Every other operation gets the true values, with
their graph, so `outputs.logits` can still be read.

The gradient of a chunk is computed in the forward pass, as in Liger (arXiv:2410.10989). It is the gradient of each
position's own loss, so losses that are not summed (`reduction="none"`) work in the same way: the backward pass
multiplies each position's gradient by what comes from above.

Under `deferred`, calls without labels do so too, for code that computes a loss of its own from the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as plain_cross_entropy
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from ..errors import VeneerError
from ..upstream.sharding import is_sharded
from . import is_autocast, is_fast
from ._conditions import takes_part

CHUNK_BYTES = 64 << 20
"""Size of a chunk's fp32 logits. Smaller chunks read the weight more often, larger ones exceed the CPU's caches
(measured with 49,152 tokens in the vocabulary)."""
SAME_SHAPE = {"float", "to", "div", "true_divide", "__truediv__", "mul", "__mul__", "__rmul__", "tanh", "contiguous"}
"""Elementwise operations, recorded if their other arguments are numbers and dtypes only."""
MOVING = {"view", "reshape", "flatten", "__getitem__"}
"""Operations that may keep the last dimension whole; they are then applied to the hidden states."""
PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta")
METHODS = ("size", "dim", "numel", "is_floating_point", "is_complex", "ndimension")
FACTS = {getattr(Tensor, name).__get__ for name in PROPERTIES} | {getattr(Tensor, name) for name in METHODS}
"""What can be read from logits without computing them."""
CASTS = ("float", "to", "contiguous")
LENT = "_veneer_lent"
"""The model's attribute with the head whose `forward` is replaced."""
DEFERRED = "_veneer_deferred"
"""The model's attribute that is there inside `deferred`."""


class Step(NamedTuple):
    """A recorded operation on logits."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Loss(NamedTuple):
    """The loss of some positions and its gradients."""

    losses: Tensor
    """Of each position (n,); or a scalar, their sum."""
    hidden: Tensor
    """Its gradient (n, in) in the hidden states."""
    learned: tuple[Tensor, ...]
    """The gradients of the head's trained parameters."""


class Logits(Tensor):
    """The logits (..., vocabulary) of hidden states (..., in), before they are computed.

    Attributes:
        hidden: the hidden states, after the recorded moves.
        steps: the recorded elementwise operations.
        origin: the logits that this was made from and the operation; None for what the head returned.
        value: the true logits, once computed.
    """

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
        self.head = head
        self.hidden = hidden
        self.steps = steps
        self.origin = origin
        self.value = None
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]  # a new object at each access
            return True
        logits = args[0] if args else kwargs.get("input")
        if isinstance(logits, Logits) and not logits.is_computed():
            result = logits.apply(func, args[1:], kwargs)
            if result is not None:
                return result
        return func(*whole(args), **whole(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*whole(args), **whole(kwargs or {}))

    def is_computed(self) -> bool:
        if self.value is not None:
            return True
        return self.origin is not None and self.origin[0].is_computed()

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The loss, or new `Logits`, from an operation; None if the operation needs the true values."""
        if func is plain_cross_entropy:
            options = {name: value for name, value in kwargs.items() if name != "input"}
            return _fast(self, *args, **options)
        return self.later(func, args, kwargs)

    def later(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Logits | None:
        """The logits with one more recorded operation; None if the operation needs the true values."""
        name = getattr(func, "__name__", "")
        step = Step(func, args, kwargs)
        if name in SAME_SHAPE and _is_simple(step):
            return Logits(self.head, self.hidden, (*self.steps, step), (self, step))
        if name in MOVING and not kwargs:
            hidden = _moved(name, self.hidden, self.head.width, args)
            if hidden is not None:
                return Logits(self.head, hidden, self.steps, (self, step))
        return None

    def compute(self) -> Tensor:
        """The true logits, with their graph."""
        if self.value is not None:
            return self.value
        if self.origin is None:
            self.value = self.head.all_at_once(self.hidden)
        else:
            parent, step = self.origin
            self.value = step.func(parent.compute(), *step.args, **step.kwargs)
        return self.value

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        if self.is_computed():
            return repr(self.compute())
        return f"Logits({tuple(self.shape)}, not computed)"


class Head:
    """A model's head in one call: the module, and the state in which it was called."""

    def __init__(self, module: nn.Module, width: int, weight: Tensor) -> None:
        self.module = module
        self.forward = module.forward
        self.width = width
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
        """What identifies the head's weights and active adapters at this moment."""
        versions = [(id(p), p._version) for p in self.module.parameters()]
        state = getattr(self.module, "state", None)
        if state is None:
            return tuple(versions)
        return (state.active, state.enabled, *versions)

    def __call__(self, hidden: Tensor) -> Tensor:
        dtype = self.dtype if self.autocast else None
        with torch.autocast(self.device, dtype=dtype, enabled=self.autocast):
            return self.forward(hidden)

    def all_at_once(self, hidden: Tensor) -> Tensor:
        """Logits as the call would have given them.

        Raises:
            VeneerError: weights or active adapters have changed since the call.
        """
        if self._now() != self.seen:
            raise VeneerError(
                "the logits of a training call were read after its head had changed (an optimizer step, another "
                "adapter); read outputs.logits before that, or switch off the fast path: VENEER_PLAIN=cross_entropy"
            )
        with torch.enable_grad():
            return self(hidden)


# The loss


class _Sum(torch.autograd.Function):
    """The summed loss of hidden states (n, in) and their labels (n,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: Head, steps: Any, smoothing: float, *_: Tensor
    ) -> Tensor:
        loss = _in_chunks(hidden, labels, head, steps, smoothing)
        ctx.save_for_backward(loss.hidden, *loss.learned)
        return loss.losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grad, *grads = (g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return grad, None, None, None, None, *grads


class _Each(torch.autograd.Function):
    """The loss of each position, for hidden states (n, in), labels (n,) and a frozen head: (n,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head, steps: Any, smoothing: float) -> Tensor:
        losses, grad = _each_in_chunks(hidden, labels, head, steps, smoothing, ctx.needs_input_grad[0])
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * upstream[:, None].to(grad.dtype), None, None, None, None


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
    """Cross-entropy of the logits that `head`, then `steps`, make of hidden states (n, in).

    Args:
        labels: (n,); positions with the label `ignore_index` are not computed.
        reduction: "mean" over supervised positions, "sum", or "none": (n,), zero at positions that are ignored.
    """
    supervised = _supervised(labels, ignore_index)
    count = len(supervised)
    if count < len(labels):
        hidden = hidden.index_select(0, supervised)
    if reduction == "none":
        losses = _each(hidden, labels[supervised], head, steps, label_smoothing)
        return losses.new_zeros(len(labels)).index_copy(0, supervised, losses)
    total = _Sum.apply(hidden, labels[supervised], head, steps, label_smoothing, *head.learned)
    if reduction == "mean":
        return total / torch.tensor(count, dtype=total.dtype)
    return total


def _supervised(labels: Tensor, ignore_index: int) -> Tensor:
    """Positions in labels (n,) that are not ignored; all of them on the meta device, where labels have no values."""
    if labels.is_meta:
        return torch.arange(len(labels), device=labels.device)
    return (labels != ignore_index).nonzero().squeeze(1)


def reference(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], steps: tuple[Step, ...] = (), **kwargs: Any
) -> Tensor:
    """`linear_cross_entropy` with plain operations."""
    return plain_cross_entropy(_after(head(hidden), steps), labels, **kwargs)


def _each(hidden: Tensor, labels: Tensor, head: Head, steps: tuple[Step, ...], smoothing: float) -> Tensor:
    """The loss of each position (n,), in fp32."""
    if head.is_frozen:
        return _Each.apply(hidden, labels, head, steps, smoothing)
    logits = _after(head(hidden), steps)
    return plain_cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)


def _each_in_chunks(
    hidden: Tensor, labels: Tensor, head: Head, steps: tuple[Step, ...], smoothing: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of each position, and the gradient of each in the hidden states if it is wanted."""
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    grad = torch.empty_like(hidden) if with_grad else None
    size = max(1, CHUNK_BYTES // (4 * head.width))
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        if grad is None:
            z = _after(linear(hidden[part], *head.parameters()), steps).float()
            losses[part] = plain_cross_entropy(z, labels[part], reduction="none", label_smoothing=smoothing)
        else:
            chunk = _frozen_chunk(hidden[part], labels[part], head, steps, smoothing)
            losses[part] = chunk.losses
            grad[part] = chunk.hidden
    return losses, grad


def _in_chunks(hidden: Tensor, labels: Tensor, head: Head, steps: Any, smoothing: float) -> Loss:
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad = torch.empty_like(hidden)
    learned = tuple(torch.zeros_like(p) for p in head.learned)
    size = max(1, CHUNK_BYTES // (4 * head.width))
    compute = _frozen_chunk if head.is_frozen else _module_chunk
    chunks = zip(hidden.split(size), labels.split(size), grad.split(size), strict=True)
    for h, t, grad_h in chunks:
        chunk = compute(h, t, head, steps, smoothing)
        total += chunk.losses.sum()
        grad_h.copy_(chunk.hidden)
        for accumulated, part in zip(learned, chunk.learned, strict=True):
            accumulated += part
    return Loss(total, grad, learned)


def _frozen_chunk(h: Tensor, t: Tensor, head: Head, steps: tuple[Step, ...], smoothing: float) -> Loss:
    """The losses of a chunk for a frozen linear head."""
    W, b = head.parameters()
    z = linear(h, W, b)
    if all(step.func.__name__ in CASTS for step in steps):
        loss, dz = _gradient(z.float(), t, smoothing)
        return Loss(loss, dz.to(W.dtype) @ W, ())
    z.requires_grad_()
    with torch.enable_grad():
        y = _after(z, steps)
    loss, dy = _gradient(y.detach().float(), t, smoothing)
    (dz,) = torch.autograd.grad(y, z, dy.to(y.dtype))
    return Loss(loss, dz @ W, ())


def _gradient(z: Tensor, t: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The losses (n,) of logits (n, vocabulary), and their gradient: softmax minus target.

    Uses torch's log_softmax to have the same rounding as the plain path: a more exact sum of the exponentials (its
    error here is 1e-5) would move first gradients 1e-4 away from the plain path's.
    """
    p = z.log_softmax(1)
    target = p.gather(1, t[:, None])  # (n, 1)
    loss = -target
    if smoothing:
        loss = (smoothing - 1) * target - smoothing * p.mean(1, keepdim=True)
    p.exp_()
    if smoothing:
        p.sub_(smoothing / z.shape[1])
    p.scatter_add_(1, t[:, None], torch.full_like(target, smoothing - 1))
    return loss.squeeze(1), p


def _module_chunk(h: Tensor, t: Tensor, head: Head, steps: tuple[Step, ...], smoothing: float) -> Loss:
    """The loss of a chunk for any other head, computed through the module with autograd."""
    h = h.detach().requires_grad_()
    with torch.enable_grad():
        z = _after(head(h), steps).float()
        loss = plain_cross_entropy(z, t, reduction="sum", label_smoothing=smoothing)
    inputs = (h, *head.learned)
    dh, *learned = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return Loss(loss.detach(), dh, tuple(learned))


# Recorded operations


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
    """`torch.nn.functional.cross_entropy` of logits that are not computed; None for options without a fast path."""
    has_options = weight is not None or size_average is not None or reduce is not None
    if has_options:
        return None
    if logits.dim() != 2 or target.dim() != 1 or target.is_floating_point():
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
    """A tree of arguments with true logits in place of `Logits`."""
    return tree_map_only(Logits, Logits.compute, tree)


def _after(t: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """The tensor after the recorded operations."""
    for func, args, kwargs in steps:
        t = func(t, *args, **kwargs)
    return t


def _is_simple(step: Step) -> bool:
    """Whether all arguments are numbers or dtypes."""
    arguments = (*step.args, *step.kwargs.values())
    return all(isinstance(argument, (int, float, torch.dtype)) for argument in arguments)


def _moved(name: str, hidden: Tensor, width: int, args: tuple[Any, ...]) -> Tensor | None:
    """Hidden states after an operation on their logits; None if the operation does not keep the last dimension."""
    if name == "flatten":
        is_leading = args in ((0, hidden.dim() - 2), (0, -2))
        return hidden.flatten(*args) if is_leading else None
    if name == "__getitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        return hidden[index] if _keeps_last(index, hidden.dim()) else None
    shape = tuple(args[0]) if isinstance(args[0], (tuple, list)) else args
    if len(shape) < 2 or shape[-1] != width:
        return None
    return hidden.reshape(*shape[:-1], hidden.shape[-1])


def _keeps_last(index: tuple[Any, ...], dims: int) -> bool:
    """Whether an index consists of slices that leave the last dimension whole."""
    if not all(i is Ellipsis or isinstance(i, slice) for i in index) or index.count(Ellipsis) > 1:
        return False
    reaches_last = Ellipsis in index or len(index) == dims
    return not reaches_last or index[-1] in (slice(None), Ellipsis)


# Installation


@contextmanager
def deferred(model: nn.Module) -> Iterator[None]:
    """Let the head of an adapted model return `Logits` in every call inside the block, with or without labels."""
    model.__dict__[DEFERRED] = True
    try:
        yield
    finally:
        del model.__dict__[DEFERRED]


def replace_forward(model: Any, kwargs: dict[str, Any]) -> None:
    """Let the model's head return `Logits` in this training call."""
    is_supervised = kwargs.get("labels") is not None and takes_part(model)
    if not (is_supervised or DEFERRED in model.__dict__) or not is_fast("cross_entropy"):
        return
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None or not _is_replaceable(model, module):
        return
    head = Head(module, module.weight.shape[0], module.weight)
    module.__dict__["forward"] = lambda hidden: Logits(head, hidden)
    model.__dict__[LENT] = module


def restore_forward(model: Any) -> None:
    """Give the head its own `forward` back after the call."""
    module = model.__dict__.pop(LENT, None)
    if module is not None:
        module.__dict__.pop("forward", None)


def _is_replaceable(model: Any, head: nn.Module) -> bool:
    """Whether the head is a linear layer, adapted or not, that computes each row independently and always the same."""
    base = getattr(head, "base_layer", head)
    if type(base) is not nn.Linear or _is_sharded(model, head, base):
        return False
    for module in (head, base):
        if "forward" in module.__dict__ or module._forward_hooks or module._backward_hooks or _may_change_input(module):
            return False
    return head is base or bool(head.is_by_row())  # type: ignore[operator]


def _is_sharded(model: nn.Module, head: nn.Module, base: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed manages the model or the head, or the weight is not a plain Parameter."""
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id") or hasattr(weight, "_fsdp_flattened"):
        return True
    return is_sharded(model) or is_sharded(head) or is_sharded(base)


def _may_change_input(module: nn.Module) -> bool:
    """Whether a forward pre-hook may change the input; a hook whose owner has `only_looks` set does not."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return not all(getattr(owner, "only_looks", False) for owner in owners)
