"""The principal part of a matrix by its singular values."""

from __future__ import annotations

import torch
from torch import Tensor


def principal(W: Tensor, r: int, iterations: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), Vh (r, in) of the r largest singular values of W (out, in), in fp32.

    With `iterations`, randomised with that many power iterations, yet the same for the same seed: what starts from
    it is recomputed when an adapter is loaded.
    """
    if iterations is None:
        U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    devices = {"devices": []} if W.device.type == "cpu" else {"devices": [W.device], "device_type": W.device.type}
    with torch.random.fork_rng(**devices):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(W.float(), q=r, niter=iterations)
    return U, S, V.mT
