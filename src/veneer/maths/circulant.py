"""Circulant matrices: each row is the row above, rotated by one place."""

from __future__ import annotations

import torch
from torch import Tensor


def circulant(kernels: Tensor) -> Tensor:
    """The matrix (m b, n b) of a grid of kernels w (m, n, b): its blocks are C[l, j] = w[(j - l) mod b]."""
    m, n, b = kernels.shape
    place = torch.arange(b, device=kernels.device)
    shift = (place - place[:, None]) % b
    blocks = kernels[..., shift]  # (m, n, b, b)
    return blocks.transpose(1, 2).reshape(m * b, n * b)


def circulant_product(kernels: Tensor, x: Tensor) -> Tensor:
    """x (..., n b) times the transpose of `circulant(kernels)`: (..., m b), by the fast Fourier transform."""
    _, n, b = kernels.shape
    dtype = torch.promote_types(x.dtype, torch.float32)  # in half precision, at most powers of 2 have an FFT
    blocks = x.to(dtype).unflatten(-1, (n, b))
    x_spectrum = torch.fft.rfft(blocks)
    kernel_spectrum = torch.fft.rfft(kernels.to(dtype)).conj()
    spectrum = torch.einsum("...nk,mnk->...mk", x_spectrum, kernel_spectrum)
    product = torch.fft.irfft(spectrum, n=b)
    return product.flatten(-2).to(x.dtype)
