"""Orthogonal start: A and B are random and nonzero, but their product B A is zero.

    A = Q[0::2]^T X / 10,  B = Y Q[1::2] / 10,  Q (r, r) orthogonal, X (r / 2, in) and Y (out, r / 2) normal

The rows Q[0::2] and Q[1::2] are orthogonal, so B A = 0, and both factors learn from the first step on.
https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError


def orthogonal(r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r).

    Raises:
        ConfigError: the rank is odd.
    """
    if r % 2:
        raise ConfigError(f"an orthogonal start halves the rank, so it must be even, not {r}")
    half = r // 2
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    X = torch.randn(half, in_features)
    Y = torch.randn(out_features, half)
    A = Q[0::2].T @ X / 10
    B = Y @ Q[1::2] / 10
    return A, B
