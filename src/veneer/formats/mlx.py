"""mlx-lm's layout: `adapter_config.json` with `lora_parameters`, and `adapters.safetensors`.

    <path>.lora_a (in, r), <path>.lora_b (r, out);  y + scale (x a) b

Modules are named by `keys`, relative to a layer or from the root; mlx-lm gives them all one rank and one scale, and
those for which the file has nothing stay as they are. `num_layers` -1 means all layers.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from ..files.read import read_json
from .lora import Hints, Lora, Pair, number, paired, read_tensors, write_settings, write_tensors

name = "mlx"
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.")


def is_here(directory: Path) -> bool:
    return (directory / WEIGHTS).is_file() and (directory / CONFIG).is_file()


def read(directory: Path, hints: Hints) -> Lora:
    settings, path = read_json(directory / CONFIG), directory / CONFIG
    kind = settings.get("fine_tune_type", "lora")
    parameters = settings.get("lora_parameters")
    if kind != "lora" or not isinstance(parameters, dict):
        raise ConfigError(f'{str(path)!r} is of a run with fine_tune_type {kind!r}; only "lora" converts')
    scale = number(parameters, "scale", path)
    tensors, _ = read_tensors(directory / WEIGHTS, hints.allow_pickle)
    found = paired(tensors, (".lora_a", ".lora_b"), directory / WEIGHTS)
    stacked = [path for path, pair in found.items() if pair[0].dim() != 2]
    if stacked:
        raise CheckpointError(f"{stacked[0]!r} adapts a stack of experts, which is no pair of matrices")
    pairs = {p: Pair(a.T.contiguous(), b.T.contiguous(), scale * a.shape[1]) for p, (a, b) in found.items()}
    dropout = parameters.get("dropout", 0.0)
    base = settings.get("model")
    return Lora(pairs, base if isinstance(base, str) else None, "CAUSAL_LM", float(dropout) if dropout else 0.0)


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
    ends = {"lora_a": "A", "lora_b": "B"}
    tensors = {f"{p}.{end}": getattr(pair, side).T for p, pair in lora.pairs.items() for end, side in ends.items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "mlx"})
    write_settings(directory / CONFIG, settings)
