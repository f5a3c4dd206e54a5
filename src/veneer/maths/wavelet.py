"""Orthogonal wavelets: their filters, computed rather than tabulated, and the synthesis step.

Daubechies' construction: the low-pass filter is a square root of (1 - y)^N sum_k C(N - 1 + k, k) y^k, with
y = (2 - z - 1/z) / 4. The choice of one root from each pair z, 1/z makes it a Daubechies wavelet or a symlet.
"""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
from torch import Tensor
from torch.nn import functional as F

SYMLETS = {2: 0b0, 3: 0b0, 4: 0b10, 5: 0b1, 6: 0b101, 7: 0b1, 8: 0b1010, 9: 0b110, 10: 0b10101}
"""For each order, the roots to take outside the unit circle for the most linear phase: bit i is the i-th smallest."""
NAMES = [*(f"db{N}" for N in range(1, 11)), *(f"sym{N}" for N in SYMLETS), "coif1", "coif2", "coif3"]
"""The names of the wavelets."""


@cache
def filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The low-pass and high-pass synthesis filters of one of `NAMES`."""
    family, order = re.findall(r"[a-z]+|\d+", name)
    N = int(order)
    low = _coiflet(N) if family == "coif" else _daubechies(N, is_symlet=family == "sym")
    signs = (-1.0) ** np.arange(len(low))
    high = low[::-1] * signs
    return tuple(low.tolist()), tuple(high.tolist())


def synthesise(c: Tensor, low_high: Tensor) -> Tensor:
    """One level of the inverse transform along the last dimension of a matrix, half low-pass, half high-pass.

    N coefficients and filters (2, L) give N - L + 2 values, those that the borders do not affect.
    """
    bands = c.unflatten(-1, (2, -1))
    taps = low_high.shape[1]
    values = F.conv_transpose1d(bands, low_high[:, None], stride=2, padding=taps - 2)
    return values.squeeze(1)


def _daubechies(N: int, is_symlet: bool) -> np.ndarray:
    zeros: list[complex] = [-1.0] * N
    for i, z in enumerate(_roots(N)):
        if is_symlet and SYMLETS[N] >> i & 1:
            z = 1 / z
        zeros.append(z)
        if abs(z.imag) >= 1e-9:
            zeros.append(z.conjugate())
    low = np.poly(zeros).real
    return low * math.sqrt(2) / low.sum()


def _roots(N: int) -> list[complex]:
    """The roots inside the unit circle, one of each conjugate pair, smallest first."""
    coefficients = [math.comb(N - 1 + k, k) for k in reversed(range(N))]
    y = np.roots(coefficients)
    upper = y[y.imag > -1e-9].astype(complex)
    half = 1 - 2 * upper  # (z + 1/z) / 2
    inside = []
    for root in half - np.sqrt(half**2 - 1):
        z = root if abs(root) < 1 else 1 / root
        inside.append(complex(z))
    return sorted(inside, key=abs)


def _coiflet(K: int) -> np.ndarray:
    """The filter of 6 K taps with 2 K vanishing moments on both sides, by Newton's method from a hat at tap 2 K."""
    n = np.arange(6 * K) - 2 * K
    hat = np.maximum(0, 1 - np.abs(n) / 2)
    low = hat / math.sqrt(2)
    exponents = np.arange(2 * K)
    powers = (n / K) ** exponents[:, None]
    moments = np.concatenate([powers, powers * (-1.0) ** n])
    moments_goal = math.sqrt(2) * (np.arange(4 * K) == 0)
    products_goal = np.arange(3 * K) == 0
    for _ in range(40):
        ahead = _shifted(low, 2)
        behind = _shifted(low, -2)
        products_error = ahead @ low - products_goal
        moments_error = moments @ low - moments_goal
        residual = np.concatenate([products_error, moments_error])
        jacobian = np.concatenate([ahead + behind, moments])
        step = np.linalg.lstsq(jacobian, residual, rcond=1e-10)[0]
        largest = max(np.abs(step).max(), 1e-30)
        low = low - step * min(1, 0.5 / largest)
    return low


def _shifted(low: np.ndarray, stride: int) -> np.ndarray:
    """A filter of 6 K taps shifted by the first 3 K multiples of a stride, one in each row."""
    taps = len(low)
    rows = []
    for i in range(taps // 2):
        shift = np.eye(taps, k=stride * i)
        rows.append(shift @ low)
    return np.stack(rows)
