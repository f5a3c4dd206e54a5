"""A pickle that runs code, as the only tensor file and under the safetensors name."""

import os

import torch
from _common import PICKLE, WEIGHTS, adapter, load, refused


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(flag),)


home = adapter()
flag = home / "ran"
(home / WEIGHTS).unlink()
torch.save({"x": Bomb()}, home / PICKLE)


def use():
    for allow in (False, True):
        try:
            load(home, allow_pickle=allow)
        except ValueError:
            continue
        return
    (home / PICKLE).rename(home / WEIGHTS)
    load(home)


refused(use, flag.exists)
