"""Orthogonal wavelets: their filters, computed rather than tabulated, and the synthesis step.

Daubechies' construction: the low-pass filter is a square root of (1 - y)^N sum_k C(N - 1 + k, k) y^k, at
y = (2 - z - 1/z) / 4; which root of each pair z, 1/z it takes makes a Daubechies wavelet or a symlet.
"""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
from torch import Tensor
from torch.nn import functional as F

SYMLETS = {2: 0b0, 3: 0b0, 4: 0b10, 5: 0b1, 6: 0b101, 7: 0b1, 8: 0b1010, 9: 0b110, 10: 0b10101}
"""For each order, which roots lie outside the unit circle for the phase nearest to linear, smallest root first."""
NAMES = [f"db{N}" for N in range(1, 11)] + [f"sym{N}" for N in SYMLETS] + [f"coif{K}" for K in (1, 2, 3)]


@cache
def filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The low-pass and high-pass synthesis filters of one of `NAMES`."""
    family, order = re.findall(r"[a-z]+|\d+", name)
    low = _coiflet(int(order)) if family == "coif" else _daubechies(int(order), family == "sym")
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    return tuple(low.tolist()), tuple(high.tolist())


def synthesise(c: Tensor, low_high: Tensor) -> Tensor:
    """One level of the inverse transform along the last dimension of a matrix: its first half low, its second high.

    From N coefficients and filters (2, L) come N - L + 2 values: those that no border touches.
    """
    taps = low_high.shape[1]
    return F.conv_transpose1d(c.unflatten(-1, (2, -1)), low_high[:, None], stride=2, padding=taps - 2).squeeze(1)


def _daubechies(N: int, is_symlet: bool) -> np.ndarray:
    zeros: list[complex] = [-1.0] * N
    for i, z in enumerate(_roots(N)):
        z = 1 / z if is_symlet and SYMLETS[N] >> i & 1 else z
        zeros += [z] if abs(z.imag) < 1e-9 else [z, z.conjugate()]
    low = np.poly(zeros).real
    return low * math.sqrt(2) / low.sum()


def _roots(N: int) -> list[complex]:
    """The roots inside the unit circle, one of each complex pair, smallest first."""
    y = np.roots([math.comb(N - 1 + k, k) for k in reversed(range(N))])
    half = 1 - 2 * y[y.imag > -1e-9].astype(complex)  # (z + 1/z) / 2
    z = half - np.sqrt(half**2 - 1)
    return sorted((complex(v if abs(v) < 1 else 1 / v) for v in z), key=abs)


def _coiflet(K: int) -> np.ndarray:
    """The filter of 6 K taps with 2 K vanishing moments on both sides, by Newton's method from a hat at tap 2 K."""
    n = np.arange(6 * K) - 2 * K
    low = np.maximum(0, 1 - np.abs(n) / 2) / math.sqrt(2)
    powers = (n / K) ** np.arange(2 * K)[:, None]
    moments = np.concatenate([powers, powers * (-1.0) ** n])
    goal = math.sqrt(2) * (np.arange(4 * K) == 0)
    for _ in range(40):
        ahead = np.stack([np.eye(6 * K, k=2 * k) @ low for k in range(3 * K)])
        behind = np.stack([np.eye(6 * K, k=-2 * k) @ low for k in range(3 * K)])
        residual = np.concatenate([ahead @ low - (np.arange(3 * K) == 0), moments @ low - goal])
        step = np.linalg.lstsq(np.concatenate([ahead + behind, moments]), residual, rcond=1e-10)[0]
        low = low - step * min(1, 0.5 / max(np.abs(step).max(), 1e-30))
    return low
