"""Hugging Face PEFT's layout, which is veneer's own: `adapter_config.json` and `adapter_model.safetensors`.

base_model.model.<path>.lora_A.weight (r, in), .lora_B.weight (out, r)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..core import checkpoint, embeddings
from ..core.config import CONFIG_NAME, Config, at
from ..core.provenance import check_undamaged
from ..errors import CheckpointError, ConfigError
from ..files.read import PICKLE_NAME, WEIGHTS_NAME, read_json
from ..methods.lora import LoRA, LoraConfig
from .lora import Hints, Lora, Pair, paired, read_tensors, write_tensors

name = "peft"
PREFIX = "base_model.model."
PLAIN_STARTS = ("True", "False", "gaussian", "orthogonal", "eva")
"""Starts of which the file holds all there is to know."""


def is_here(directory: Path) -> bool:
    path = directory / CONFIG_NAME
    has_tensors = any((directory / file).is_file() for file in (WEIGHTS_NAME, PICKLE_NAME))
    return path.is_file() and has_tensors and "peft_type" in read_json(path)


def read(directory: Path, hints: Hints) -> Lora:
    if (directory / WEIGHTS_NAME).is_file():
        file = directory / WEIGHTS_NAME
        config, tensors, notes = checkpoint.load(directory)
        check_undamaged(notes)
    else:
        file, config = directory / PICKLE_NAME, Config.from_pretrained(directory)
        tensors, _ = read_tensors(file, hints.allow_pickle)
    plain = check_plain(config)
    strange = [key for key in tensors if not key.startswith(PREFIX)]
    if strange:
        raise CheckpointError(f"{str(file)!r}: {strange[0]!r} does not begin with {PREFIX!r}")
    refuse_embeddings(tensors)
    own = {key.removeprefix(PREFIX): t for key, t in tensors.items()}
    pairs = {
        path: _pair(plain, path, *both)
        for path, both in paired(own, (".lora_A.weight", ".lora_B.weight"), file).items()
    }
    return Lora(pairs, plain.base_model_name_or_path, plain.task_type, plain.lora_dropout, plain.target_modules)


def check_plain(config: Config) -> LoraConfig:
    """Raise ConfigError unless the config is a LoRA that its pairs of matrices say all about."""
    more = "convert it with veneer.convert_to_lora first"
    if not isinstance(config, LoraConfig) or type(config).adapter is not LoRA:
        raise ConfigError(f"only LoRA adapters have a layout in other projects; this is {config.peft_type}; {more}")
    given: list[Any] = [*config.variants()]
    given += [f'bias="{config.bias}"'] if config.bias != "none" else []
    fields = ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication", "lora_bias")
    given += [name for name in fields if getattr(config, name)]
    if given:
        raise ConfigError(f"this LoRA has {', '.join(dict.fromkeys(given))}, which is more than its pairs say; {more}")
    if str(config.init_lora_weights) not in PLAIN_STARTS:
        raise ConfigError(f"this LoRA starts from the base's weights ({config.init_lora_weights!r}); {more}")
    return config


def refuse_embeddings(tensors: Any) -> None:
    for key in tensors:
        if "lora_embedding_" in key or embeddings.is_one(key):
            raise ConfigError(f"{key}: an embedding, which the other layouts do not hold as PEFT does")


def _pair(config: LoraConfig, path: str, A: Any, B: Any) -> Pair:
    """rsLoRA's alpha / sqrt(r) becomes alpha' / r."""
    alpha = at(path, config.alpha_pattern, config.lora_alpha)
    return Pair(A, B, alpha * math.sqrt(A.shape[0]) if config.use_rslora else alpha)


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    first = next(iter(lora.pairs.values()))
    alphas = {path: _tidy(pair.alpha) for path, pair in lora.pairs.items()}
    config = LoraConfig(
        r=first.r,
        lora_alpha=_tidy(first.alpha),
        rank_pattern={path: pair.r for path, pair in lora.pairs.items() if pair.r != first.r},
        alpha_pattern={path: a for path, a in alphas.items() if a != _tidy(first.alpha)},
        lora_dropout=lora.dropout,
        target_modules=list(lora.pairs) if lora.targets is None else lora.targets,
        task_type=lora.task,
        base_model_name_or_path=hints.model or lora.base,
        inference_mode=True,
    )
    ends = {"lora_A": "A", "lora_B": "B"}
    write_tensors(
        directory / WEIGHTS_NAME,
        {
            f"{PREFIX}{p}.{end}.weight": getattr(pair, side)
            for p, pair in lora.pairs.items()
            for end, side in ends.items()
        },
    )
    config.save_pretrained(directory)


def _tidy(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
