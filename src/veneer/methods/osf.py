"""OSF: train the minor singular directions of the weight, with gradients orthogonal to the principal ones.

    W' = W + U S V^T - U0 S0 V0^T,  U0 S0 V0^T the part of W beyond its first k singular values
    dL/dU loses its part within the first k left singular vectors, dL/dV that within the right ones

Nayak et al., 2025, arXiv:2504.07097, for learning several tasks in sequence. Trainable: (min(in, out) - k)
(in + out + 1) per target. Mergeable. Starts as a no-op. Optimizers that scale each entry separately (Adam) leave the
orthogonal subspace slightly. Unlike in PEFT, several adapters can be active together, and merging can be undone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.config import LayerConfig, Name, at, mapping
from ..errors import ConfigError
from ..maths.svd import principal
from ..targets.target import Target


class Guarded(torch.autograd.Function):
    """The identity, with a projected gradient.

    The gradient loses its component in the span of an orthonormal basis; with `inside` it keeps only that component.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, basis: Tensor, inside: bool) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.inside = inside
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (basis,) = ctx.saved_tensors
        within = basis @ (basis.mT @ grad)
        return within if ctx.inside else grad - within, None, None


class OSF(LowRank):
    def __init__(self, config: OSFConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        W = target.original_weight()
        self.k = config.rank_for(target)
        U, S, Vh = principal(W, min(W.shape))
        # rounded to the dtype of the weight, as in PEFT's files
        U = U.to(W.dtype).float()
        S = S.to(W.dtype).float()
        Vh = Vh.to(W.dtype).float()
        self.keep("U", U)
        self.keep("V", Vh.mT)
        self.register_buffer("start_S", S[self.k :], persistent=False)
        starts = {"U_low": self.start_U, "S_low": self.start_S, "V_low": self.start_V.mT}
        as_no_op = config.init_weights is not False
        parameters = {}
        for name, start in starts.items():
            tensor = torch.empty(start.shape) if as_no_op else torch.randn(start.shape)
            parameters[name] = nn.Parameter(tensor)
        self.osf_svd_params = nn.ParameterDict(parameters)
        if as_no_op:
            self.copy_(starts)

    @torch.no_grad()
    def copy_(self, starts: dict[str, Tensor]) -> None:
        for name, start in starts.items():
            parameter = self.osf_svd_params[name]
            if not parameter.is_meta:
                parameter.copy_(start)

    def keep(self, name: str, vectors: Tensor) -> None:
        """Register the minor singular vectors, and the principal ones if `guarded` needs them.

        If the basis is complete, the minor ones suffice: they span everything that is orthogonal to the principal ones.
        """
        start = vectors[:, self.k :].contiguous()
        is_complete = vectors.shape[0] == vectors.shape[1]
        high = None if is_complete else vectors[:, : self.k].contiguous()
        self.register_buffer(f"start_{name}", start, persistent=False)
        self.register_buffer(f"high_{name}", high, persistent=False)

    def guarded(self, vectors: Tensor, start: Tensor, high: Tensor | None) -> Tensor:
        """The vectors, with gradients orthogonal to the principal singular vectors `high`."""
        if high is None:
            return Guarded.apply(vectors, start, True)
        return Guarded.apply(vectors, high, False)

    def factors(self) -> tuple[Tensor, Tensor]:
        U = self.osf_svd_params["U_low"]
        S = self.osf_svd_params["S_low"]
        V = self.osf_svd_params["V_low"].mT
        U = self.guarded(U, self.start_U, self.high_U)
        V = self.guarded(V, self.start_V, self.high_V)
        A = torch.cat([V, self.start_V], dim=1).mT
        B = torch.cat([U * S, -self.start_U * self.start_S], dim=1)
        return A, B

    def expected_parameters(self) -> int:
        in_features = self.target.in_features
        out_features = self.target.out_features
        directions = min(in_features, out_features) - self.k
        return directions * (in_features + out_features + 1)

    def describe(self) -> str:
        return f"{self.start_S.numel()} directions beyond {self.k}"


@dataclass(kw_only=True)
class OSFConfig(LayerConfig):
    effective_rank: int | float | None = None
    """k: the number of singular directions that stay unchanged, or their share as a float up to 1.0; None: half."""
    rank_pattern: dict[str, int | float] | None = mapping()
    """Numbers or shares for specific targets, by name ending or regular expression."""
    init_weights: bool | None = True
    """Start as a no-op; False: random (for tests)."""
    target_svd_config: dict[str, int] | None = None
    """Ignored; kept for PEFT compatibility."""

    peft_type = Name("OSF")
    adapter = OSF
    patterns = ("rank_pattern",)
    default_roles = (
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.qkv",
        "attention.out",
        "mlp.in",
        "mlp.out",
    )
    learning_rate = 5e-5

    def rank_for(self, target: Target) -> int:
        """k for a target."""
        smaller = min(target.in_features, target.out_features)
        asked = at(target.path, self.rank_pattern, self.effective_rank)
        if asked is None:
            k = smaller // 2
        elif isinstance(asked, float) and asked <= 1:
            k = int(smaller * asked)
        else:
            k = int(asked)
        if not 1 <= k < smaller:
            raise ConfigError(
                f"effective_rank {asked} on {target.path!r} keeps {k} of its {smaller} directions; keep at least 1 and "
                "leave at least 1 to train"
            )
        return k
