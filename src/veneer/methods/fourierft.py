"""FourierFT: learn n entries of the 2-D spectrum of the weight update.

    W' = W + alpha Re(ifft2(S)),  S (out, in) zero except n entries at fixed random places

Gao et al., 2024, arXiv:2405.03003. Trainable: n per target. Mergeable. Starts as a no-op with `init_weights=True`; the
default, as in the paper and in PEFT, is a random start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Additive
from ..core.config import LayerConfig, Name, at, mapping
from ..errors import ConfigError
from ..targets.target import Target


class FourierFT(Additive):
    def __init__(self, config: FourierFTConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        n = at(target.path, config.n_frequency_pattern, config.n_frequency)
        size = target.in_features * target.out_features
        if not 1 <= n <= size:
            raise ConfigError(f"n_frequency on {target.path!r} must lie between 1 and in x out = {size}, not {n}")
        self.n_frequency = n
        self.scaling = config.scaling
        spectrum = torch.zeros(n) if config.init_weights else torch.randn(n)
        self.fourierft_spectrum = nn.Parameter(spectrum)
        generator = torch.Generator(device="cpu").manual_seed(config.random_loc_seed)
        places = torch.randperm(size, generator=generator, device="cpu")[:n]
        entries, spots = hermitian_half(places, target.out_features, target.in_features)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("entries", entries, persistent=False)
        self.register_buffer("spots", spots, persistent=False)

    def delta(self) -> Tensor:
        rows = self.target.out_features
        columns = self.target.in_features
        spectrum = self.fourierft_spectrum.float()
        S = spectrum.new_zeros(rows * (columns // 2 + 1))
        S = S.index_add(0, self.spots, spectrum[self.entries] / 2)
        delta = torch.fft.irfft2(S.view(rows, -1), (rows, columns))
        delta = delta * self.scaling
        return delta.to(self.fourierft_spectrum.dtype)

    def describe(self) -> str:
        return f"n={self.fourierft_spectrum.numel()}"


def hermitian_half(places: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Place the entries of a real spectrum S (rows, columns) in the left half of (S(u, v) + S(-u, -v)) / 2.

    The inverse transform of that sum is the real part of the inverse transform of S, and half of the sum determines it.
    Returns (index of the entry, its place among rows x (columns // 2 + 1)), where an entry has one or two places.
    """
    half = columns // 2 + 1
    u = places // columns
    v = places % columns
    u = torch.cat((u, -u % rows))
    v = torch.cat((v, -v % columns))
    is_left = v < half
    entries = torch.arange(len(places), device=places.device).repeat(2)
    spots = u * half + v
    return entries[is_left], spots[is_left]


@dataclass(kw_only=True)
class FourierFTConfig(LayerConfig):
    n_frequency: int = 1000
    """n: number of learned entries per target, at most in_features x out_features."""
    scaling: float = 150.0
    """alpha: usually 100 to 300, larger for smaller n."""
    random_loc_seed: int = 777
    """Seed of the random places of the entries."""
    n_frequency_pattern: dict[str, int] | None = mapping()
    """n for specific targets, by name ending or regular expression."""
    init_weights: bool = False
    """Start at zero, as a no-op; False: random normal values, as in the paper."""

    peft_type = Name("FOURIERFT")
    adapter = FourierFT
    patterns = ("n_frequency_pattern",)
    learning_rate = 0.1
    recommended = {"init_weights": True}
