"""A pickle of what torch's safe reader builds, but no tensors by name: nested, of other types, sparse, on no device."""

import torch
from _common import PICKLE, WEIGHTS, VeneerError, adapter, load, refused

home = adapter()
(home / WEIGHTS).unlink()


def use():
    for content in (
        [torch.zeros(2)],
        {"x": {"y": torch.zeros(2)}},
        {"x": torch.zeros(2).to_sparse()},
        {1: torch.zeros(2)},
    ):
        torch.save(content, home / PICKLE)
        try:
            load(home, allow_pickle=True)
        except VeneerError as error:
            last = error
        else:
            return
    raise last


refused(use)
