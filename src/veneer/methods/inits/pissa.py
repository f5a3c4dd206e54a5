"""PiSSA: start the update at the principal singular directions of the weight.

    A0 = sqrt(S_r / s) V_r^T,  B0 = U_r sqrt(S_r / s)   so that s B0 A0 is the best rank-r approximation of W

Meng et al., 2024, arXiv:2404.02948. "pissa": exact SVD; "pissa_niter_N": randomised SVD with N power iterations. PEFT
draws a new random projection whenever it loads such a file, so it recovers the residual only approximately; here the
projection is fixed.
"""

from __future__ import annotations

import re

from torch import Tensor

from ...errors import ConfigError
from ...maths.svd import principal


def pissa(W: Tensor, r: int, scaling: float, how: str) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) from a weight W (out, in).

    Raises:
        ConfigError: `how` is neither "pissa" nor "pissa_niter_N", or the rank exceeds that of the weight.
    """
    name = re.fullmatch(r"pissa(?:_niter_(\d+))?", how)
    if name is None:
        raise ConfigError(f'init_lora_weights {how!r}: write "pissa" or "pissa_niter_N" with a number N')
    if r > min(W.shape):
        raise ConfigError(f"PiSSA of rank {r} needs a weight of at least that rank, not {tuple(W.shape)}")
    iterations = name.group(1)
    U, S, Vh = principal(W, r, None if iterations is None else int(iterations))
    root = (S / scaling).sqrt()
    A0 = Vh * root[:, None]
    B0 = U * root
    return A0.contiguous(), B0.contiguous()
