"""What is learned from pairs of answers. Each objective is one file, with its formula and its settings.

`ALL` has the objectives by name; "sft", the loss of the answer's tokens, is that of the model itself and no part of it.
"""

from __future__ import annotations

from .base import Objective
from .dpo import DPO
from .orpo import ORPO
from .simpo import SimPO

ALL: dict[str, type[Objective]] = {"dpo": DPO, "orpo": ORPO, "simpo": SimPO}
"""The objectives by the names they have in recipes."""
