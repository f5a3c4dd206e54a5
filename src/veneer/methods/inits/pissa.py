"""PiSSA: start the update at the principal singular directions of the weight.

    A0 = sqrt(S_r / s) V_r^T,  B0 = U_r sqrt(S_r / s)   so that s B0 A0 is the best rank-r approximation of W

Meng et al., 2024, arXiv:2404.02948. "pissa": exact SVD; "pissa_niter_N": randomised, N power iterations. PEFT draws
the projection anew whenever it loads such a file, so that there its residual is met only nearly; here it is fixed.
"""

from __future__ import annotations

import re

from torch import Tensor

from ...errors import ConfigError
from ...maths.svd import principal


def pissa(W: Tensor, r: int, scaling: float, how: str) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) of a weight W (out, in).

    Raises:
        ConfigError: `how` is neither "pissa" nor "pissa_niter_N", or the rank exceeds that of the weight.
    """
    iterations = re.fullmatch(r"pissa(?:_niter_(\d+))?", how)
    if iterations is None:
        raise ConfigError(f'init_lora_weights {how!r}: write "pissa" or "pissa_niter_N" with a number N')
    if r > min(W.shape):
        raise ConfigError(f"PiSSA of rank {r} needs a weight of at least that rank, not {tuple(W.shape)}")
    steps = iterations.group(1)
    U, S, Vh = principal(W, r, None if steps is None else int(steps))
    root = (S / scaling).sqrt()
    return (Vh * root[:, None]).contiguous(), (U * root).contiguous()
