"""WaveFT: learn n wavelet coefficients of the weight update.

    W' = W + alpha IDWT(C),  C zero except n entries at fixed random positions

Bilican et al., 2025, arXiv:2505.12532. Trainable: n per target. Mergeable. Starts as a no-op. The transform is
orthogonal and has one level. C is larger than W by the wavelet's overlap; the order of its quarters (low-low, high-low;
low-high, high-high, as rows-columns) is that of PEFT's files. PEFT's filters for coif4 and coif5 are not orthonormal,
so these two are refused, and so are the longer wavelets that PEFT lists but has no filters for.
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
    """Distributes the coefficients over the targets in proportion to their sizes."""

    def __init__(self, entries: int, coefficients: int) -> None:
        super().__init__()
        self.entries = entries
        self.coefficients = coefficients

    def share(self, entries: int) -> int:
        """The number of coefficients for a target with `entries` entries."""
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
        spectrum = torch.zeros(n) if config.init_weights else torch.randn(n) * 0.01
        self.waveft_spectrum = nn.Parameter(spectrum)
        taps = torch.tensor(filters(config.wavelet_family), dtype=torch.float32, device="cpu")
        self.register_buffer("filters", taps if config.use_idwt else None, persistent=False)
        generator = torch.Generator(device="cpu").manual_seed(config.random_loc_seed)
        order = torch.randperm(size, generator=generator, device="cpu")
        self.register_buffer("positions", self.positions_in_C(order[:n]), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of C: that of W, padded for the overlap and to even sizes."""
        rows = self.target.out_features
        columns = self.target.in_features
        if self.filters is None:
            return rows, columns
        overlap = self.filters.shape[1] - 2
        return rows + overlap + rows % 2, columns + overlap + columns % 2

    def positions_in_C(self, positions: Tensor) -> Tensor:
        """Flat positions in C of entries chosen in W: W is centred in C, and C's quarters get the order of the file."""
        rows, columns = self.shape
        width = self.target.in_features
        top = (rows - self.target.out_features) // 2
        left = (columns - width) // 2
        i = positions // width + top
        j = positions % width + left
        if self.filters is not None:  # in the file, the upper right quarter is high in rows, not in columns
            half_rows = rows // 2
            half_columns = columns // 2
            crossed = (i >= half_rows) != (j >= half_columns)
            i = torch.where(crossed, (i + half_rows) % rows, i)
            j = torch.where(crossed, (j + half_columns) % columns, j)
        return i * columns + j

    def delta(self) -> Tensor:
        rows, columns = self.shape
        values = self.waveft_spectrum * self.scaling
        zeros = self.waveft_spectrum.new_zeros(rows * columns)
        C = zeros.index_put((self.positions,), values).view(rows, columns)
        if self.filters is None:
            return C
        taps = self.filters.to(C)
        half = synthesise(C, taps).mT
        padded = synthesise(half, taps).mT
        return padded[: self.target.out_features, : self.target.in_features]

    def describe(self) -> str:
        family = self.config.wavelet_family if self.config.use_idwt else "sparse"
        return f"n={self.waveft_spectrum.numel()}, {family}"


@dataclass(kw_only=True)
class WaveFTConfig(LayerConfig):
    n_frequency: int = 2592
    """n: learned coefficients per target, at most in_features x out_features."""
    scaling: float = 25.0
    """alpha: strength of the update."""
    wavelet_family: str = "db1"
    """The wavelet: "db1" (Haar) to "db10", "sym2" to "sym10", "coif1" to "coif3"."""
    use_idwt: bool = True
    """Apply the inverse wavelet transform; False: the coefficients are entries of the update."""
    random_loc_seed: int = 777
    """Seed of the coefficients' positions."""
    n_frequency_pattern: dict[str, int] | None = mapping()
    """`n_frequency` for specific targets, by name ending or regular expression."""
    proportional_parameters: bool = False
    """Larger targets get more coefficients, `n_frequency` on average; `n_frequency_pattern` is ignored."""
    init_weights: bool = True
    """Start as a no-op; False: small random values."""

    peft_type = Name("WAVEFT")
    adapter = WaveFT
    patterns = ("n_frequency_pattern",)
    learning_rate = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet_family not in NAMES:
            raise ConfigError(f"wavelet_family {self.wavelet_family!r}: use one of {', '.join(NAMES)}")

    def build_shared(self, targets: Sequence[Target]) -> Budget | None:
        if not self.proportional_parameters:
            return None
        entries = sum(target.in_features * target.out_features for target in targets)
        return Budget(entries, self.n_frequency * len(targets))
