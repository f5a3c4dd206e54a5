"""OSF: train the lesser singular directions of the weight, by steps orthogonal to the principal ones.

    W' = W + U S V^T - U0 S0 V0^T,  U0 S0 V0^T the part of W beyond its first k singular values
    dL/dU loses its part within the first k left singular vectors, dL/dV that within the right ones

Nayak et al., 2025, arXiv:2504.07097, for learning tasks one after another. Trainable: (min(in, out) - k) (in + out + 1)
per target. Mergeable. Starts as a no-op. An optimizer that scales entries apart (Adam) leaves the orthogonal subspace
a little. Unlike PEFT, several adapters act together, and merging can be undone.
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
    """The identity, whose gradient loses its part within an orthonormal basis, or with `inside` keeps only that."""

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
        U, S, Vh = (part.to(W.dtype).float() for part in principal(W, min(W.shape)))  # rounded as PEFT's files are
        self.keep("U", U)
        self.keep("V", Vh.mT)
        self.register_buffer("start_S", S[self.k :], persistent=False)
        starts = {"U_low": self.start_U, "S_low": self.start_S, "V_low": self.start_V.mT}
        as_no_op = config.init_weights is not False
        make = torch.empty if as_no_op else torch.randn
        self.osf_svd_params = nn.ParameterDict({name: nn.Parameter(make(t.shape)) for name, t in starts.items()})
        if as_no_op and not self.osf_svd_params["S_low"].is_meta:
            with torch.no_grad():
                for name, start in starts.items():
                    self.osf_svd_params[name].copy_(start)

    def keep(self, name: str, vectors: Tensor) -> None:
        """The lesser singular vectors; the principal ones only where they are not all that is orthogonal to those."""
        is_whole = vectors.shape[0] == vectors.shape[1]
        self.register_buffer(f"start_{name}", vectors[:, self.k :].contiguous(), persistent=False)
        self.register_buffer(f"high_{name}", None if is_whole else vectors[:, : self.k].contiguous(), persistent=False)

    def guarded(self, vectors: Tensor, start: Tensor, high: Tensor | None) -> Tensor:
        return Guarded.apply(vectors, start, True) if high is None else Guarded.apply(vectors, high, False)

    def factors(self) -> tuple[Tensor, Tensor]:
        U, S, Vh = (self.osf_svd_params[name] for name in ("U_low", "S_low", "V_low"))
        U, V = self.guarded(U, self.start_U, self.high_U), self.guarded(Vh.mT, self.start_V, self.high_V)
        return torch.cat([V, self.start_V], dim=1).mT, torch.cat([U * S, -self.start_U * self.start_S], dim=1)

    def expected_parameters(self) -> int:
        sizes = self.target.in_features, self.target.out_features
        return (min(sizes) - self.k) * (sum(sizes) + 1)

    def describe(self) -> str:
        return f"{self.start_S.numel()} directions beyond {self.k}"


@dataclass(kw_only=True)
class OSFConfig(LayerConfig):
    effective_rank: int | float | None = None
    """Singular directions to keep as they are, k; up to 1.0 a share of all. None: half of them."""
    rank_pattern: dict[str, int | float] | None = mapping()
    """Other numbers or shares for some targets, by name ending or regular expression."""
    init_weights: bool | None = True
    """Start as a no-op; False: random (for tests)."""
    target_svd_config: dict[str, int] | None = None
    """No effect; a field of the file."""

    peft_type, adapter = Name("OSF"), OSF
    patterns = ("rank_pattern",)
    default_roles = (*(f"attention.{part}" for part in ("q", "k", "v", "qkv", "out")), "mlp.in", "mlp.out")
    learning_rate = 5e-5

    def rank_for(self, target: Target) -> int:
        """k on a target."""
        smaller = min(target.in_features, target.out_features)
        asked = at(target.path, self.rank_pattern, self.effective_rank)
        is_share = isinstance(asked, float) and asked <= 1
        k = smaller // 2 if asked is None else int(smaller * asked) if is_share else int(asked)
        if not 1 <= k < smaller:
            raise ConfigError(
                f"effective_rank {asked} on {target.path!r} keeps {k} of its {smaller} directions; keep at least 1 and "
                "leave at least 1 to train"
            )
        return k
