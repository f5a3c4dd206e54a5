"""RMSNorm that keeps only its input for the backward pass.

    y = w x / sqrt(mean(x^2) + eps);   dx = r (g w) - x r^3 mean(g w x),  r = 1 / sqrt(mean(x^2) + eps)

In half precision, the RMSNorm of transformers keeps fp32 copies of its input and of the normalised input. torch's
LayerNorm needs no replacement: it keeps only its input already. RMSNorms differ in two ways (w or 1 + w, and where they
round), which are recognised by comparing results on a probe, so no class names are needed. On CUDA, the kernel of
liger-kernel is used if it is installed (arXiv:2410.10989).
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import is_fast
from ._conditions import kind_of, takes_part

EPSILONS = ("variance_epsilon", "eps", "epsilon")


class Kind(NamedTuple):
    """How an RMSNorm scales: `offset` is added to w; `late` rounds to x's dtype after the product with w."""

    offset: float
    late: bool


KINDS = (Kind(0.0, False), Kind(0.0, True), Kind(1.0, True))


class RMSNorm(torch.autograd.Function):
    """RMSNorm of x (..., n) with the weight w (n,), scaled as in `Kind(offset, late)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, offset: float, late: bool) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, r)
        ctx.offset = offset
        ctx.late = late
        y = wide * r
        if late:
            return y.mul_(_scale(w.float(), offset)).to(x.dtype)
        y = y.to(x.dtype)
        scale = _scale(w, offset)
        can_overwrite = y.dtype == torch.promote_types(y.dtype, w.dtype)
        return y.mul_(scale) if can_overwrite else y * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, r = ctx.saved_tensors
        wide = x.float()
        g = g.float()
        dw = None
        if ctx.needs_input_grad[1]:
            rows = (g * wide * r).flatten(0, -2)
            dw = rows.sum(0).to(w.dtype)
        scaled = g * _scale(w.float(), ctx.offset)
        dot = torch.linalg.vecdot(scaled, wide).unsqueeze(-1)
        dot.mul_(r.pow(3))
        dx = scaled.mul_(r).addcmul_(wide, dot, value=-1.0 / x.shape[-1])
        return dx.to(x.dtype), dw, None, None, None


def _scale(w: Tensor, offset: float) -> Tensor:
    return w + offset if offset else w


def reference(x: Tensor, w: Tensor, eps: float, offset: float, late: bool) -> Tensor:
    """`RMSNorm` with plain operations."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if late:
        return (y * (offset + w.float())).to(x.dtype)
    return (offset + w) * y.to(x.dtype)


def recognised(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm of one of `KINDS`."""
    return _kind_of(module) is not None


def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces the `forward` of a recognised module."""
    if args or kwargs or not is_fast("norm") or not takes_part(self):
        return type(self).forward(self, x, *args, **kwargs)
    offset, late = _kind_of(self) or KINDS[0]
    function = _on_cuda() if x.is_cuda else None
    if function is None:
        return RMSNorm.apply(x, self.weight, _epsilon(self), offset, late)
    casting_mode = "gemma" if late else "llama"
    return function.apply(x, self.weight, _epsilon(self), offset, casting_mode, False)


# Recognition


def _epsilon(module: nn.Module) -> float | None:
    for name in EPSILONS:
        if hasattr(module, name):
            epsilon = getattr(module, name)
            return epsilon if isinstance(epsilon, float) else None
    return None


def _kind_of(module: nn.Module) -> Kind | None:
    """The kind of an RMSNorm; None for other modules."""
    has_weight_only = list(module._parameters) == ["weight"] and not module._modules and not module._buffers
    weight = module._parameters.get("weight")
    if not has_weight_only or weight is None or weight.dim() != 1 or _epsilon(module) is None:
        return None
    key = kind_of(module)
    if key not in _kinds:
        _kinds[key] = _find_kind(module)
    return _kinds[key]


_kinds: dict[Any, Kind | None] = {}


def _find_kind(module: nn.Module) -> Kind | None:
    for kind in KINDS:
        if _agrees(module, kind):
            return kind
    return None


@torch.no_grad()
def _agrees(module: nn.Module, kind: Kind) -> bool:
    """Whether the module gives the results of `reference` for random inputs, in fp32 and bf16."""
    generator = torch.Generator().manual_seed(0)
    probe = copy.copy(module)
    probe.__dict__.pop("forward", None)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 5, generator=generator).to(dtype)
        w = torch.randn(5, generator=generator).to(dtype)
        probe.__dict__["_parameters"] = {"weight": nn.Parameter(w, requires_grad=False)}
        try:
            out = type(module).forward(probe, x)
        except Exception:  # another kind of module with one weight
            return False
        want = reference(x, w, _epsilon(module) or 0.0, *kind)
        if not isinstance(out, Tensor) or out.dtype != want.dtype:
            return False
        if not torch.allclose(out, want, 1e-6, 1e-6):
            return False
    return True


@cache
def _on_cuda() -> Any:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return None
    return LigerRMSNormFunction
