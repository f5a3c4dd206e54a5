"""LLaMA-Adapter: let attention also read learned tokens, through a gate that starts at zero.

    y' = y + W_o g softmax(q K_P^T / sqrt(d)) V_P,  K_P = W_k P, V_P = W_v P, P (n, width) learned, g learned

q is the attention's own query with its position applied; the keys of P have no position. Zhang et al., 2023,
arXiv:2303.16199. Trainable: n x width + 1 in each of the last `adapter_layers` attentions. Not mergeable: the update
depends on the input. Starts as a no-op. PEFT adds the bias of W_o twice, so its adapter does not start as a no-op if
there is such a bias. With a fused projection (GPT-2) PEFT leaves W_o out; so do we, since its files were trained that
way. There is one gate per layer, as in PEFT; the paper's code has one per head.
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

SEPARATE = ("attention.q", "attention.k", "attention.v", "attention.out")
FUSED = ("attention.qkv",)


class AdaptionPrompt(Adapter):
    kinds = frozenset({"block"})

    def __init__(self, config: AdaptionPromptConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        self.names = _names(target)
        modeling = sys.modules[type(target.base).__module__]
        self.rotate: Any = getattr(modeling, "apply_rotary_pos_emb", None)
        prompt = torch.randn(1, config.adapter_len or 0, target.in_features)
        self.adaption_prompt = nn.Parameter(prompt)
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = self.target.dtype or x.dtype
        P = self.adaption_prompt[0].to(dtype)  # (n, width)
        q, k, v = self._project(x.to(dtype), P)
        q = self._turned(self._split_heads(q, "q_norm"))  # (batch, heads, time, d)
        k = self._split_heads(k, "k_norm")  # (key heads, n, d)
        v = self._split_heads(v)
        k = _repeat_heads(k, q.shape[1])
        v = _repeat_heads(v, q.shape[1])
        products = torch.einsum("bhtd,hnd->bhtn", q, k)
        scores = products / math.sqrt(q.shape[-1])
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        attended = torch.einsum("bhtn,hnd->bthd", weights, v)
        attended = attended.flatten(2)
        if len(self.names) > 1:
            attended = self._project_out(attended)
        return y + self.adaption_gate * attended.to(y.dtype)

    def _project(self, x: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the input, keys and values of the learned tokens."""
        if len(self.names) == 1:
            qkv = self.target.child(self.names[0])
            q = qkv(x).chunk(3, dim=-1)[0]
            _, k, v = qkv(P).chunk(3, dim=-1)
            return q, k, v
        q_name, k_name, v_name, _ = self.names
        q = self.target.child(q_name)(x)
        k = self.target.child(k_name)(P)
        v = self.target.child(v_name)(P)
        return q, k, v

    def _project_out(self, attended: Tensor) -> Tensor:
        """W_o without its bias, which y contains already."""
        out = self.target.child(self.names[3])
        projected = out(attended)
        if out.bias is None:
            return projected
        return projected - out(torch.zeros_like(attended[:1, :1]))

    def _split_heads(self, t: Tensor, norm_name: str = "no_norm") -> Tensor:
        """(..., time, heads x d) -> (..., heads, time, d), after the attention's norm of the whole or of each head."""
        norm: Any = getattr(self.target.base, norm_name, None)
        d = self.target.base.head_dim
        norms_each_head = norm is not None and norm.weight.numel() == d
        if norm is not None and not norms_each_head:
            t = norm(t)
        heads = t.unflatten(-1, (-1, d))
        if norms_each_head:
            heads = norm(heads)
        return heads.transpose(-3, -2)

    def _turned(self, q: Tensor) -> Tensor:
        """Apply rotary positions with the architecture's own function, since layouts differ between architectures."""
        rotations = self.target.argument("position_embeddings")
        if rotations is None or self.rotate is None:
            return q
        d = rotations[0].shape[-1]
        turning = q[..., :d]
        constant = q[..., d:]
        turned = self.rotate(turning, turning, *rotations)[0]
        return torch.cat([turned, constant], dim=-1)

    def expected_parameters(self) -> int:
        return self.config.adapter_len * self.target.in_features + 1

    def describe(self) -> str:
        return f"{self.config.adapter_len} tokens"


def _repeat_heads(t: Tensor, heads: int) -> Tensor:
    """Repeat the heads of keys or values for grouped-query attention."""
    return t.repeat_interleave(heads // len(t), dim=0)


def _names(target: Target) -> tuple[str, ...]:
    """The names of the attention's projections: q, k, v and out, or the fused one."""
    names_by_role = projections(target.base) if hasattr(target.base, "head_dim") else {}
    for roles in (SEPARATE, FUSED):
        names = tuple(names_by_role.get(role, "") for role in roles)
        if all(names) and "." not in "".join(names):
            return names
    raise TargetError(
        f"{target.path!r} ({type(target.base).__name__}) is no attention of a known form: it needs head_dim and "
        f"projections for queries, keys, values and the output, or a fused one; found {names_by_role}"
    )


@dataclass(kw_only=True)
class AdaptionPromptConfig(LayerConfig):
    adapter_len: int | None = None
    """Number n of learned tokens in each attention (10 in the paper)."""
    adapter_layers: int | None = None
    """Number of attentions to adapt, counted from the last layer (30 of 32 in the paper)."""

    peft_type = Name("ADAPTION_PROMPT")
    adapter = AdaptionPrompt
    example = {"adapter_len": 10, "adapter_layers": 2}
    default_roles = ("attention",)
    learning_rate = 5e-2

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):  # PEFT writes a name ending as a plain string
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
        target_modules = names[0] if len(names) == 1 else names
        return super().to_dict() | {"target_modules": target_modules}
