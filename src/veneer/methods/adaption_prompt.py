"""LLaMA-Adapter: attention also looks at learned tokens, behind a gate that starts closed.

    y' = y + W_o g softmax(q K_P^T / sqrt(d)) V_P,  K_P = W_k P, V_P = W_v P, P (n, width) learned, g learned

q is the layer's own query at its position, P has none. Zhang et al., 2023, arXiv:2303.16199. Trainable: n x width + 1
in each of the last `adapter_layers` attentions. Not mergeable: it depends on the input. Starts as a no-op; PEFT adds
the bias of W_o once more, so that with one it does not. After a fused projection (GPT-2) PEFT leaves W_o out, and its
files mean that. One gate a layer, as in PEFT; the paper's code has one a head.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import LayerConfig, Name, check_range
from ..errors import ConfigError, TargetError
from ..targets.roles import projections
from ..targets.target import Target

SEPARATE, FUSED = ("attention.q", "attention.k", "attention.v", "attention.out"), ("attention.qkv",)


class AdaptionPrompt(Adapter):
    kinds = frozenset({"block"})

    def __init__(self, config: AdaptionPromptConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.names = _names(target)
        self.rotate = getattr(sys.modules[type(target.base).__module__], "apply_rotary_pos_emb", None)
        self.adaption_prompt = nn.Parameter(torch.randn(1, config.adapter_len or 0, target.in_features))
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = self.target.dtype or x.dtype
        x, P = x.to(dtype), self.adaption_prompt[0].to(dtype)
        if len(self.names) == 1:
            fused = self.target.child(self.names[0])
            q, (_, k, v) = fused(x).chunk(3, dim=-1)[0], fused(P).chunk(3, dim=-1)
        else:
            q, k, v = (self.target.child(name)(t) for name, t in zip(self.names, (x, P, P), strict=False))
        q, k, v = self._turned(self._heads(q, "q_norm")), self._heads(k, "k_norm"), self._heads(v)
        k, v = (t.repeat_interleave(q.shape[1] // len(t), dim=0) for t in (k, v))
        scores = torch.einsum("bhtd,hnd->bhtn", q, k) / math.sqrt(q.shape[-1])
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        seen = torch.einsum("bhtn,hnd->bthd", weights, v).flatten(2)
        if len(self.names) > 1:
            out = self.target.child(self.names[3])
            seen = out(seen) - (0 if out.bias is None else out(torch.zeros_like(seen[:1, :1])))
        return y + self.adaption_gate * seen.to(y.dtype)

    def _heads(self, t: Tensor, norm: str = "no_norm") -> Tensor:
        """(..., time, heads x d) -> (..., heads, time, d), normed as the attention norms it: whole, or each head."""
        normed, d = getattr(self.target.base, norm, None), self.target.base.head_dim
        if normed is not None and normed.weight.numel() != d:
            return normed(t).unflatten(-1, (-1, d)).transpose(-3, -2)
        t = t.unflatten(-1, (-1, d))
        return (t if normed is None else normed(t)).transpose(-3, -2)

    def _turned(self, q: Tensor) -> Tensor:
        """Queries at their positions: some architectures halve what others interleave, so by their own function."""
        rotations = self.target.argument("position_embeddings")
        if rotations is None or self.rotate is None:
            return q
        d = rotations[0].shape[-1]
        return torch.cat([self.rotate(q[..., :d], q[..., :d], *rotations)[0], q[..., d:]], dim=-1)

    def expected_parameters(self) -> int:
        return self.config.adapter_len * self.target.in_features + 1

    def describe(self) -> str:
        return f"{self.config.adapter_len} tokens"


def _names(target: Target) -> tuple[str, ...]:
    """The attention's projections: q, k, v and out, or the fused one."""
    found = projections(target.base) if hasattr(target.base, "head_dim") else {}
    for names in (tuple(found.get(role, "") for role in wanted) for wanted in (SEPARATE, FUSED)):
        if all(names) and "." not in "".join(names):
            return names
    raise TargetError(
        f"{target.path!r} ({type(target.base).__name__}) is no attention of a known form: it needs head_dim and "
        f"projections for queries, keys, values and the output, or a fused one; found {found}"
    )


@dataclass(kw_only=True)
class AdaptionPromptConfig(LayerConfig):
    adapter_len: int | None = None
    """Learned tokens n in each attention (the paper: 10)."""
    adapter_layers: int | None = None
    """How many attentions to adapt, counted from the top (the paper: 30 of 32)."""

    peft_type, adapter, example = Name("ADAPTION_PROMPT"), AdaptionPrompt, {"adapter_len": 10, "adapter_layers": 2}
    default_roles = ("attention",)
    learning_rate = 5e-2

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):  # a name's ending, as PEFT writes it
            self.target_modules = [self.target_modules]
        super().__post_init__()
        if self.adapter_len is None or self.adapter_layers is None:
            raise ConfigError("adapter_len and adapter_layers must say how many tokens to learn, in how many layers")
        check_range(self, 1, math.inf, "adapter_len", "adapter_layers")

    def choose(self, paths: list[str]) -> list[str]:
        count = self.adapter_layers or 0
        if len(paths) < count:
            raise TargetError(f"adapter_layers = {count}, but the targets are {len(paths)}: {paths}")
        return paths[-count:]

    def to_dict(self) -> dict[str, Any]:
        names: Any = self.target_modules or [None]
        return super().to_dict() | {"target_modules": names[0] if len(names) == 1 else names}
