"""Methods that turn or transform activations, derived again in NumPy from their papers."""

from __future__ import annotations

import numpy as np
import pytest

import veneer

from .test_numpy import adapt, agree


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road(variant: int):
    """R built entry by entry: rows (a cos t, -a sin t) and (a sin t, a cos t) over pairs within groups of 14."""
    size = 14
    layer, p, W, b = adapt(veneer.RoadConfig, "linear", variant=f"road_{variant}", group_size=size)
    out, half, R = len(W), size // 2, np.zeros((len(W), len(W)))
    shape = (out // size, *{1: (1, 1), 2: (1, 2), 4: (2, 2)}[variant], half)
    theta, alpha = (
        np.broadcast_to(p[k].reshape(shape), (out // size, 2, 2, half)) for k in ("road_theta", "road_alpha")
    )
    for g, k in np.ndindex(out // size, half):
        one, two = g * size + k, g * size + half + k
        for row, (own, other, sign) in enumerate([(one, two, -1), (two, one, 1)]):
            R[own, own] = alpha[g, 0, row, k] * np.cos(theta[g, 0, row, k])
            R[own, other] = sign * alpha[g, 1, row, k] * np.sin(theta[g, 1, row, k])
    agree(layer, R @ W, R @ b)
