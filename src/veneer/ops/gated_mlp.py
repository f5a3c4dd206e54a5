"""Gated MLPs and activations that keep their inputs alone for the backward pass.

    down(act(gate(x)) * up(x));   of act(g) * u only g and u are kept, and act(g) is computed again

Activations that transformers writes out in Python (GPT-2's GELU keeps five tensors) go to torch's own, which keep one.
Both are recognised by trying, so that no class is named. On CUDA liger-kernel's, where installed (arXiv:2410.10989).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..upstream.models import is_from
from . import is_fast
from ._conditions import kind_of, takes_part

Activation = Callable[[Tensor], Tensor]
TORCH: dict[str, Activation] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
"""Activations that torch computes in one pass, keeping their input."""
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class Gated(torch.autograd.Function):
    """act(g) * u."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, act: Activation) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.act = act
        a = act(g)
        return a.mul_(u) if a.dtype == torch.promote_types(a.dtype, u.dtype) and a is not g else a * u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        g, u = ctx.saved_tensors
        with torch.enable_grad():
            a = ctx.act(g := g.detach().requires_grad_())
        (dg,) = torch.autograd.grad(a, g, (grad * u).to(a.dtype))
        return dg, a.detach().mul(grad).to(u.dtype), None


def reference(g: Tensor, u: Tensor, act: Activation) -> Tensor:
    """The same, the plain way."""
    return act(g) * u


def forward(self: Any, x: Tensor) -> Tensor:
    """What stands in for the `forward` of a recognised gated MLP."""
    if not is_fast("gated_mlp") or not takes_part(self):
        return type(self).forward(self, x)
    act = torchs_own(self.act_fn) or self.act_fn
    if x.is_cuda and act is F.silu and (function := _on_cuda()) is not None:
        return self.down_proj(function.apply(self.gate_proj(x), self.up_proj(x)))
    return self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x), act))


def activate(self: nn.Module, x: Tensor) -> Tensor:
    """What stands in for the `forward` of an activation that torch has."""
    own = torchs_own(self) if is_fast("gated_mlp") and takes_part(self) else None
    return type(self).forward(self, x) if own is None else own(x)


def recognised(module: nn.Module) -> bool:
    """Whether a module is a gated MLP of gate_proj, up_proj, down_proj and act_fn, without dropout."""
    has_parts = all(name in module._modules for name in PARTS) and len(module._modules) == len(PARTS)
    learns = module._parameters or (has_parts and any(True for _ in module.act_fn.parameters()))
    return has_parts and not learns and _is_gated(type(module), module)


def is_written_out(module: nn.Module) -> bool:
    """Whether a module is an activation in Python that torch has."""
    if module._parameters or module._modules or not is_from(module, "activations"):
        return False
    return torchs_own(module) is not None and _kept(module) > 1


def _kept(act: nn.Module) -> int:
    """How many tensors an activation keeps for its backward pass."""
    kept: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.enable_grad():
        type(act).forward(act, torch.ones(2, requires_grad=True))
    return len(kept)


_gated: dict[Any, bool] = {}
_own: dict[Any, Activation | None] = {}


@torch.no_grad()
def _is_gated(kind: type, module: nn.Module) -> bool:
    """What a class makes of a few small layers tells whether it is the formula."""
    key = kind_of(module)
    if key not in _gated:
        with torch.random.fork_rng(devices=[]):  # what a run draws must not depend on what was tried before it
            layers = {"gate_proj": nn.Linear(5, 7), "up_proj": nn.Linear(5, 7), "down_proj": nn.Linear(7, 5)}
        probe: Any = copy.copy(module)
        probe.__dict__["_modules"] = {**layers, "act_fn": module.act_fn}
        x = torch.linspace(-3, 3, 40).reshape(1, 8, 5).sin()
        try:
            out = kind.forward(probe, x)  # type: ignore[attr-defined]
        except Exception:  # another kind of module altogether
            out = None
        want = layers["down_proj"](reference(layers["gate_proj"](x), layers["up_proj"](x), probe.act_fn))
        _gated[key] = isinstance(out, Tensor) and out.shape == want.shape and torch.allclose(out, want, 1e-6, 1e-6)
    return _gated[key]


@torch.no_grad()
def torchs_own(act: nn.Module) -> Activation | None:
    """torch's function for an activation module, if it has one that agrees to rounding."""
    kind = type(act)
    key = kind_of(act)
    if key not in _own:
        x = torch.cat([torch.linspace(-12, 12, 4801), torch.linspace(-0.01, 0.01, 101)])
        try:
            out = kind.forward(act, x)  # type: ignore[attr-defined]
        except Exception:  # it takes something else
            out = x.new_full((), torch.nan)
        agree = (f for f in TORCH.values() if out.shape == x.shape and torch.allclose(out, f(x), 2e-6, 2e-6))
        _own[key] = next(agree, None)
    return _own[key]


@cache
def _on_cuda() -> Any:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerSiLUMulFunction
