"""FourierFT: learn n entries of the 2-D spectrum of the weight update.

    W' = W + alpha Re(ifft2(S)),  S (out, in) zero except n entries at fixed random places

Gao et al., 2024, arXiv:2405.03003. Trainable: n per target. Mergeable. Starts as a no-op with `init_weights=True`; the
paper, and PEFT by default, start at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Additive
from ..core.config import LayerConfig, Name, at, mapping
from ..core.target import Target
from ..errors import ConfigError


class FourierFT(Additive):
    def __init__(self, config: FourierFTConfig, target: Target, shared: nn.Module | None = None) -> None:
        super().__init__(config, target, shared)
        n = at(target.path, config.n_frequency_pattern, config.n_frequency)
        size = target.in_features * target.out_features
        if not 1 <= n <= size:
            raise ConfigError(f"n_frequency on {target.path!r} must lie between 1 and in x out = {size}, not {n}")
        self.scaling = config.scaling
        self.fourierft_spectrum = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))
        generator = torch.Generator(device="cpu").manual_seed(config.random_loc_seed)
        places = torch.randperm(size, generator=generator, device="cpu")[:n]
        self.register_buffer("places", places, persistent=False)

    def delta(self) -> Tensor:
        shape = self.target.out_features, self.target.in_features
        spectrum = self.fourierft_spectrum.float()
        S = spectrum.new_zeros(shape[0] * shape[1]).index_put((self.places,), spectrum).view(shape)
        return (torch.fft.ifft2(S).real * self.scaling).to(self.fourierft_spectrum.dtype)

    def describe(self) -> str:
        return f"n={self.fourierft_spectrum.numel()}"


@dataclass(kw_only=True)
class FourierFTConfig(LayerConfig):
    n_frequency: int = 1000
    """Learned entries per target, at most in_features x out_features."""
    scaling: float = 150.0
    """alpha: about 100 to 300; larger for smaller n."""
    random_loc_seed: int = 777
    """Seed of the entries' places."""
    n_frequency_pattern: dict[str, int] | None = mapping()
    """Other numbers of entries for some targets, by name ending or regular expression."""
    init_weights: bool = False
    """Start at zero, as a no-op; False: normal values, as in the paper."""

    peft_type, adapter = Name("FOURIERFT"), FourierFT
    patterns = ("n_frequency_pattern",)
    learning_rate = 0.1
    recommended = {"init_weights": True}
