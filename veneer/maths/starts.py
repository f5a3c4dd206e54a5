"""How the weights of a small network start, by the names in use; `last` is the layer that writes to the output."""

from __future__ import annotations

import math

from torch import Tensor, nn


def normal_(W: Tensor, last: bool) -> None:
    nn.init.normal_(W, std=0.02)


def zero_last_(W: Tensor, last: bool) -> None:
    if last:
        nn.init.zeros_(W)
    else:
        nn.init.kaiming_uniform_(W, a=math.sqrt(5))


def truncated_(W: Tensor, last: bool) -> None:
    """Within two standard deviations of a hundredth."""
    nn.init.trunc_normal_(W, std=0.01, a=-0.02, b=0.02)


STARTS = {"bert": normal_, "mam_adapter": zero_last_, "houlsby": truncated_}
