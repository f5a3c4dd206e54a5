"""RMSNorm that keeps its input alone for the backward pass.

    y = w x / sqrt(mean(x^2) + eps);   dx = r (g w) - x r^3 mean(g w x),  r = 1 / sqrt(mean(x^2) + eps)

In half precision transformers' own keeps fp32 copies of its input and of what it makes of it. torch's LayerNorm needs
nothing of the kind: it keeps its input already. Kinds of RMSNorm differ in two ways (w or 1 + w, and where they round),
which is found out by trying, so that no class is named. On CUDA liger-kernel's, where installed (arXiv:2410.10989).
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import is_fast
from ._conditions import kind_of, takes_part

EPSILONS = ("variance_epsilon", "eps", "epsilon")


class RMSNorm(torch.autograd.Function):
    """x (..., n) and w (n,); `offset` is added to w; `late`: rounded to x's dtype after w was multiplied in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, offset: float, late: bool) -> Tensor:
        wide = x.float()
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, r)
        ctx.offset, ctx.late = offset, late
        y = wide * r
        if late:
            return y.mul_(w.float() + offset if offset else w.float()).to(x.dtype)
        y = y.to(x.dtype)
        scale = w + offset if offset else w
        return y.mul_(scale) if y.dtype == torch.promote_types(y.dtype, w.dtype) else y * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, r = ctx.saved_tensors
        wide, g = x.float(), g.float()
        dw = (g * wide * r).flatten(0, -2).sum(0).to(w.dtype) if ctx.needs_input_grad[1] else None
        scaled = g * (w.float() + ctx.offset if ctx.offset else w.float())
        dot = torch.linalg.vecdot(scaled, wide).unsqueeze(-1)
        dx = scaled.mul_(r).addcmul_(wide, dot.mul_(r.pow(3)), value=-1.0 / x.shape[-1])
        return dx.to(x.dtype), dw, None, None, None


def reference(x: Tensor, w: Tensor, eps: float, offset: float, late: bool) -> Tensor:
    """The same, the plain way."""
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (y * (offset + w.float())).to(x.dtype) if late else (offset + w) * y.to(x.dtype)


def recognised(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm of a kind that is known here."""
    return _kind_of(module) is not None


def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What stands in for a recognised module's own `forward`."""
    if args or kwargs or not is_fast("norm") or not takes_part(self):
        return type(self).forward(self, x, *args, **kwargs)
    offset, late = _kind_of(self) or (0.0, False)
    function = _on_cuda() if x.is_cuda else None
    if function is not None:
        return function.apply(x, self.weight, _epsilon(self), offset, "gemma" if late else "llama", False)
    return RMSNorm.apply(x, self.weight, _epsilon(self), offset, late)


def _epsilon(module: nn.Module) -> float | None:
    found = [getattr(module, name) for name in EPSILONS if hasattr(module, name)]
    return found[0] if found and isinstance(found[0], float) else None


def _kind_of(module: nn.Module) -> tuple[float, bool] | None:
    """(offset, late) of a module, None where it is no RMSNorm known here."""
    is_one = list(module._parameters) == ["weight"] and not module._modules and not module._buffers
    weight = module._parameters.get("weight")
    if not is_one or weight is None or weight.dim() != 1 or _epsilon(module) is None:
        return None
    kind = kind_of(module)
    if kind not in _kinds:  # what it makes of a few numbers tells
        _kinds[kind] = next((way for way in ((0.0, False), (0.0, True), (1.0, True)) if _agrees(module, *way)), None)
    return _kinds[kind]


_kinds: dict[Any, tuple[float, bool] | None] = {}


@torch.no_grad()
def _agrees(module: nn.Module, offset: float, late: bool) -> bool:
    draw = torch.Generator().manual_seed(0)
    probe = copy.copy(module)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 5, generator=draw).to(dtype)
        w = torch.randn(5, generator=draw).to(dtype)
        probe.__dict__["_parameters"] = {"weight": nn.Parameter(w, requires_grad=False)}
        probe.__dict__.pop("forward", None)
        try:
            out = type(module).forward(probe, x)
        except Exception:  # another kind of module altogether
            return False
        want = reference(x, w, _epsilon(module) or 0.0, offset, late)
        if not isinstance(out, Tensor) or out.dtype != want.dtype or not torch.allclose(out, want, 1e-6, 1e-6):
            return False
    return True


@cache
def _on_cuda() -> Any:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return None
    return LigerRMSNormFunction
