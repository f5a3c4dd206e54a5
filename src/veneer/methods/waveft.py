"""WaveFT: learn n wavelet coefficients of the weight update.

    W' = W + alpha IDWT(C),  C zero except n entries at fixed random places

Bilican et al., 2025, arXiv:2505.12532. Trainable: n per target. Mergeable. Starts as a no-op. One level of an
orthogonal transform; C is larger than W by the wavelet's overlap, its quarters (low-low, high-low; low-high, high-high
as rows-columns) as in PEFT's files. PEFT's tables of coif4 and coif5 are no wavelets (not orthonormal), so these are
refused, as are the longer ones that it lists and does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Additive
from ..core.config import LayerConfig, Name, at, mapping
from ..errors import ConfigError
from ..maths.wavelet import NAMES, filters, synthesise
from ..targets.target import Target


class Budget(nn.Module):
    """Shares the coefficients of all targets out in proportion to their sizes."""

    def __init__(self, entries: int, coefficients: int) -> None:
        super().__init__()
        self.entries, self.coefficients = entries, coefficients

    def share(self, entries: int) -> int:
        return max(1, round(entries / self.entries * self.coefficients))


class WaveFT(Additive):
    def __init__(self, config: WaveFTConfig, target: Target, shared: Budget | None = None) -> None:
        super().__init__(config, target, shared)
        size = target.in_features * target.out_features
        n = shared.share(size) if shared else at(target.path, config.n_frequency_pattern, config.n_frequency)
        self.n_frequency = n
        if not 1 <= n <= size:
            raise ConfigError(f"n_frequency on {target.path!r} must lie between 1 and in x out = {size}, not {n}")
        self.scaling = config.scaling
        self.waveft_spectrum = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n) * 0.01)
        taps = torch.tensor(filters(config.wavelet_family), dtype=torch.float32, device="cpu")
        self.register_buffer("filters", taps if config.use_idwt else None, persistent=False)
        generator = torch.Generator(device="cpu").manual_seed(config.random_loc_seed)
        places = torch.randperm(size, generator=generator, device="cpu")[:n]
        self.register_buffer("places", self.place(places), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """That of C: W's, with room for the overlap, made even."""
        sizes = self.target.out_features, self.target.in_features
        if self.filters is None:
            return sizes
        overlap = self.filters.shape[1] - 2
        return sizes[0] + overlap + sizes[0] % 2, sizes[1] + overlap + sizes[1] % 2

    def place(self, places: Tensor) -> Tensor:
        """Where the entries chosen in a matrix of W's size stand in C: in its middle, then the quarters as filed."""
        (rows, columns), target = self.shape, self.target
        i = places // target.in_features + (rows - target.out_features) // 2
        j = places % target.in_features + (columns - target.in_features) // 2
        if self.filters is not None:  # the file's upper right quarter is high in rows, not in columns
            crossed = (i >= rows // 2) != (j >= columns // 2)
            i = torch.where(crossed, (i + rows // 2) % rows, i)
            j = torch.where(crossed, (j + columns // 2) % columns, j)
        return i * columns + j

    def delta(self) -> Tensor:
        spectrum, (rows, columns), target = self.waveft_spectrum, self.shape, self.target
        C = spectrum.new_zeros(rows * columns).index_put((self.places,), spectrum * self.scaling).view(rows, columns)
        if self.filters is None:
            return C
        taps = self.filters.to(C)
        whole = synthesise(synthesise(C, taps).mT, taps).mT
        return whole[: target.out_features, : target.in_features]

    def describe(self) -> str:
        return f"n={self.waveft_spectrum.numel()}, {self.config.wavelet_family if self.config.use_idwt else 'sparse'}"


@dataclass(kw_only=True)
class WaveFTConfig(LayerConfig):
    n_frequency: int = 2592
    """Learned coefficients per target, at most in_features x out_features."""
    scaling: float = 25.0
    """alpha: strength of the update."""
    wavelet_family: str = "db1"
    """The wavelet: "db1" (Haar) to "db10", "sym2" to "sym10", "coif1" to "coif3"."""
    use_idwt: bool = True
    """False: the coefficients are entries of the update themselves."""
    random_loc_seed: int = 777
    """Seed of the coefficients' places."""
    n_frequency_pattern: dict[str, int] | None = mapping()
    """Other numbers of coefficients for some targets, by name ending or regular expression."""
    proportional_parameters: bool = False
    """Larger targets get more coefficients, n_frequency on average; the pattern is not looked at."""
    init_weights: bool = True
    """Start as a no-op; False: small random values."""

    peft_type, adapter = Name("WAVEFT"), WaveFT
    patterns = ("n_frequency_pattern",)
    learning_rate = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet_family not in NAMES:
            raise ConfigError(f"wavelet_family {self.wavelet_family!r}: use one of {', '.join(NAMES)}")

    def build_shared(self, targets: Sequence[Target]) -> Budget | None:
        sizes = [target.in_features * target.out_features for target in targets]
        return Budget(sum(sizes), self.n_frequency * len(sizes)) if self.proportional_parameters else None
