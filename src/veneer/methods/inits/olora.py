"""OLoRA: start the update at the first r steps of the weight's QR decomposition.

    W = Q R,  A0 = R[:r],  B0 = Q[:, :r]

Büyükakyüz, 2024, arXiv:2406.01775. The scaling s is not divided out of the factors, so s B0 A0 is subtracted. PEFT
decomposes GPT-2's Conv1D as stored, (in, out), so its factors have the right shapes only if the weight is square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError


def olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) from a weight W (out, in).

    Raises:
        ConfigError: the rank exceeds that of the weight.
    """
    if r > min(W.shape):
        raise ConfigError(f"OLoRA of rank {r} needs a weight of at least that rank, not {tuple(W.shape)}")
    Q, R = torch.linalg.qr(W.float())
    A0 = R[:r].contiguous()
    B0 = Q[:, :r].contiguous()
    return A0, B0
