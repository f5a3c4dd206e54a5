"""Gated MLPs and activations that keep only their inputs for the backward pass.

    down(act(gate(x)) * up(x));   for act(g) * u, only g and u are kept, and act(g) is recomputed

Activations that transformers implements in Python (its GELU for GPT-2 keeps five tensors) are replaced by torch's,
which keep one. Both are recognised by comparing results on a probe, so no class names are needed. On CUDA, the kernel
of liger-kernel is used if it is installed (arXiv:2410.10989).
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
"""Activations that torch computes in one pass, keeping only their input."""
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


class Gated(torch.autograd.Function):
    """act(g) * u."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, act: Activation) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.act = act
        a = act(g)
        dtype = torch.promote_types(a.dtype, u.dtype)
        can_overwrite = a.dtype == dtype and a is not g
        return a.mul_(u) if can_overwrite else a * u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        g, u = ctx.saved_tensors
        g = g.detach().requires_grad_()
        with torch.enable_grad():
            a = ctx.act(g)
        da = (grad * u).to(a.dtype)
        (dg,) = torch.autograd.grad(a, g, da)
        du = a.detach().mul(grad)
        return dg, du.to(u.dtype), None


def reference(g: Tensor, u: Tensor, act: Activation) -> Tensor:
    """`Gated` with plain operations."""
    return act(g) * u


def forward(self: Any, x: Tensor) -> Tensor:
    """Replaces the `forward` of a recognised gated MLP."""
    if not is_fast("gated_mlp") or not takes_part(self):
        return type(self).forward(self, x)
    act = torchs_own(self.act_fn) or self.act_fn
    function = _on_cuda() if x.is_cuda and act is F.silu else None
    if function is not None:
        return self.down_proj(function.apply(self.gate_proj(x), self.up_proj(x)))
    return self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x), act))


def activate(self: nn.Module, x: Tensor) -> Tensor:
    """Replaces the `forward` of an activation that torch also implements."""
    function = None
    if is_fast("gated_mlp") and takes_part(self):
        function = torchs_own(self)
    if function is None:
        return type(self).forward(self, x)
    return function(x)


# Recognition


def recognised(module: nn.Module) -> bool:
    """Whether a module is a gated MLP of gate_proj, up_proj, down_proj and act_fn, without dropout."""
    names = module._modules.keys()
    if module._parameters or names != set(PARTS):
        return False
    has_learned_activation = any(True for _ in module.act_fn.parameters())
    return not has_learned_activation and _is_gated(type(module), module)


def is_written_out(module: nn.Module) -> bool:
    """Whether a module is a transformers activation in Python that torch also implements."""
    if module._parameters or module._modules or not is_from(module, "activations"):
        return False
    return torchs_own(module) is not None and _saved_tensors(module) > 1


def _saved_tensors(act: nn.Module) -> int:
    """The number of tensors that an activation keeps for its backward pass."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.enable_grad():
        type(act).forward(act, torch.ones(2, requires_grad=True))
    return len(saved)


_gated: dict[Any, bool] = {}
_torchs_own: dict[Any, Activation | None] = {}


def _is_gated(kind: type, module: nn.Module) -> bool:
    """Whether the class computes the formula; determined once for each kind of module."""
    key = kind_of(module)
    if key not in _gated:
        _gated[key] = _agrees(kind, module)
    return _gated[key]


@torch.no_grad()
def _agrees(kind: type, module: nn.Module) -> bool:
    """Whether the class and the formula give the same result on small layers."""
    with torch.random.fork_rng(devices=[]):  # a run's random draws must not depend on what was probed before
        gate = nn.Linear(5, 7)
        up = nn.Linear(5, 7)
        down = nn.Linear(7, 5)
    probe: Any = copy.copy(module)
    probe.__dict__["_modules"] = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": module.act_fn}
    x = torch.linspace(-3, 3, 40).reshape(1, 8, 5).sin()
    try:
        out = kind.forward(probe, x)  # type: ignore[attr-defined]
    except Exception:  # another kind of module with the same parts
        return False
    want = down(reference(gate(x), up(x), probe.act_fn))
    return isinstance(out, Tensor) and out.shape == want.shape and torch.allclose(out, want, 1e-6, 1e-6)


def torchs_own(act: nn.Module) -> Activation | None:
    """torch's function for an activation module; None if none agrees up to rounding."""
    key = kind_of(act)
    if key not in _torchs_own:
        _torchs_own[key] = _equal_function(act)
    return _torchs_own[key]


@torch.no_grad()
def _equal_function(act: nn.Module) -> Activation | None:
    kind: Any = type(act)
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.linspace(-0.01, 0.01, 101)])
    try:
        out = kind.forward(act, x)
    except Exception:  # it takes other arguments
        return None
    if out.shape != x.shape:
        return None
    for function in TORCH.values():
        if torch.allclose(out, function(x), 2e-6, 2e-6):
            return function
    return None


@cache
def _on_cuda() -> Any:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerSiLUMulFunction
