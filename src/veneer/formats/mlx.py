"""mlx-lm's layout: `adapter_config.json` with `lora_parameters`, and `adapters.safetensors`.

    <path>.lora_a (in, r), <path>.lora_b (r, out);  y + scale (x a) b

Modules are named by `keys`, relative to a layer or to the root. All have one rank and one scale, and mlx-lm leaves
modules without tensors in the file unchanged. `num_layers` -1 means all layers.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from ..files.read import read_json
from .lora import Hints, Lora, Pair, number, paired, read_tensors, write_settings, write_tensors

name = "mlx"
CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.")


def is_here(directory: Path) -> bool:
    return (directory / WEIGHTS).is_file() and (directory / CONFIG).is_file()


def read(directory: Path, hints: Hints) -> Lora:
    path = directory / CONFIG
    settings = read_json(path)
    kind = settings.get("fine_tune_type", "lora")
    parameters = settings.get("lora_parameters")
    if kind != "lora" or not isinstance(parameters, dict):
        raise ConfigError(f'{str(path)!r} was trained with fine_tune_type {kind!r}; only "lora" can be converted')
    scale = number(parameters, "scale", path)
    tensors, _ = read_tensors(directory / WEIGHTS, hints.allow_pickle)
    pairs = {}
    for module, (a, b) in paired(tensors, (".lora_a", ".lora_b"), directory / WEIGHTS).items():
        if a.dim() != 2:
            raise CheckpointError(
                f"{module!r} adapts a stack of experts, which other layouts cannot store as a pair of matrices"
            )
        r = a.shape[1]
        pairs[module] = Pair(a.T.contiguous(), b.T.contiguous(), scale * r)
    dropout = float(parameters.get("dropout") or 0.0)
    base = settings.get("model")
    if not isinstance(base, str):
        base = None
    return Lora(pairs, base, "CAUSAL_LM", dropout)


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    lora.matrices_only(name)
    r, alpha = lora.one_rank(name)
    keys = sorted({LAYER.sub("", path, count=1) for path in lora.pairs})
    settings = {
        "fine_tune_type": "lora",
        "model": hints.model or lora.base,
        "num_layers": -1,
        "lora_parameters": {"rank": r, "scale": alpha / r, "dropout": lora.dropout, "keys": keys},
    }
    tensors = {key: t.T for key, t in lora.tensors(".lora_a", ".lora_b").items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "mlx"})
    write_settings(directory / CONFIG, settings)
