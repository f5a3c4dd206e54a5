"""Circulant matrices: each row is the one above it, turned on by one place."""

from __future__ import annotations

import torch
from torch import Tensor


def circulant(kernels: Tensor) -> Tensor:
    """The matrix of a grid (m, n, b) of kernels w: blocks C[l, j] = w[(j - l) mod b], together (m b, n b)."""
    m, n, b = kernels.shape
    place = torch.arange(b, device=kernels.device)
    blocks = kernels[..., (place - place[:, None]) % b]  # (m, n, b, b)
    return blocks.transpose(1, 2).reshape(m * b, n * b)


def circulant_product(kernels: Tensor, x: Tensor) -> Tensor:
    """x (..., n b) times the transpose of `circulant(kernels)`: (..., m b), by the fast Fourier transform."""
    _, n, b = kernels.shape
    wide = torch.promote_types(x.dtype, torch.float32)  # no Fourier transform of other sizes in half precision
    spectrum = torch.einsum(
        "...nk,mnk->...mk", torch.fft.rfft(x.to(wide).unflatten(-1, (n, b))), torch.fft.rfft(kernels.to(wide)).conj()
    )
    return torch.fft.irfft(spectrum, n=b).flatten(-2).to(x.dtype)
