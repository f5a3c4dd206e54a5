"""Hugging Face PEFT's layout, which is veneer's own: `adapter_config.json` and `adapter_model.safetensors`.

base_model.model.<path>.lora_A.weight (r, in), .lora_B.weight (out, r)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import checkpoint, embeddings
from ..core.config import CONFIG_NAME, Config, at
from ..core.provenance import check_undamaged
from ..errors import CheckpointError, ConfigError
from ..files.read import PICKLE_NAME, PREFIX, WEIGHTS_NAME, read_json
from ..methods.lora import LoRA, LoraConfig
from .lora import Hints, Lora, Pair, paired, read_tensors, write_tensors

name = "peft"
PLAIN_STARTS = ("True", "False", "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights unchanged, so that A and B are the whole adapter."""
MORE_THAN_PAIRS = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
)
"""Fields of a config that make an adapter more than pairs A, B on modules."""


def is_here(directory: Path) -> bool:
    path = directory / CONFIG_NAME
    has_tensors = any((directory / file).is_file() for file in (WEIGHTS_NAME, PICKLE_NAME))
    return path.is_file() and has_tensors and "peft_type" in read_json(path)


def read(directory: Path, hints: Hints, variants: Collection[str] = ()) -> Lora:
    """Read an adapter; `variants` are those of LoRA that the caller can represent besides A, B and alpha."""
    if (directory / WEIGHTS_NAME).is_file():
        file = directory / WEIGHTS_NAME
        config, tensors, notes, _ = checkpoint.load(directory)
        check_undamaged(notes)
    else:
        file = directory / PICKLE_NAME
        config = Config.from_pretrained(directory)
        tensors, _ = read_tensors(file, hints.allow_pickle)
    plain = check_plain(config, variants)
    by_path = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{str(file)!r}: {key!r} does not begin with {PREFIX!r}")
        by_path[key.removeprefix(PREFIX)] = tensor
    refuse_embeddings(tensors)
    pairs = {}
    for path, (A, B) in paired(by_path, (".lora_A.weight", ".lora_B.weight"), file).items():
        pairs[path] = Pair(A, B, _alpha(plain, path, A))
    return Lora(pairs, plain.base_model_name_or_path, plain.task_type, plain.lora_dropout, plain.target_modules)


def is_plain(config: Config, variants: Collection[str] = ()) -> bool:
    """Whether A, B, alpha and some variants are the whole adapter, so that it can be taken from its file."""
    try:
        check_plain(config, variants)
    except ConfigError:
        return False
    return True


def check_plain(config: Config, variants: Collection[str] = ()) -> LoraConfig:
    """The config, if A, B, alpha and some variants are the whole adapter; else raises ConfigError."""
    advice = "first turn it into a plain LoRA with `veneer combine ADAPTER --weights 1 --out DIR`"
    requested = config.variants() if isinstance(config, LoraConfig) else []
    is_allowed = bool(requested) and set(requested) <= set(variants)
    if not isinstance(config, LoraConfig) or not (type(config).adapter is LoRA or is_allowed):
        raise ConfigError(f"only LoRA adapters can be converted to other layouts; this is {config.peft_type}; {advice}")
    features: list[Any] = [name for name in requested if name not in variants]
    if config.bias != "none":
        features.append(f'bias="{config.bias}"')
    for field in MORE_THAN_PAIRS:
        if getattr(config, field):
            features.append(field)
    if features:
        names = ", ".join(dict.fromkeys(features))
        raise ConfigError(f"this LoRA has {names}, which the matrices A and B do not include; {advice}")
    if str(config.init_lora_weights) not in PLAIN_STARTS:
        raise ConfigError(f"this LoRA was initialised from the base's weights ({config.init_lora_weights!r}); {advice}")
    return config


def refuse_embeddings(tensors: Iterable[str]) -> None:
    """Raise ConfigError if a key belongs to an embedding."""
    for key in tensors:
        if "lora_embedding_" in key or embeddings.is_one(key):
            raise ConfigError(f"{key}: adapters on embeddings cannot be converted to other layouts")


def _alpha(config: LoraConfig, path: str, A: Tensor) -> float:
    """alpha of a module, for the scaling alpha / r; rsLoRA's is alpha / sqrt(r)."""
    alpha: float = at(path, config.alpha_pattern, config.lora_alpha)
    if config.use_rslora:
        alpha *= math.sqrt(A.shape[0])
    return alpha


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    first = next(iter(lora.pairs.values()))
    ranks = {}
    alphas = {}
    for path, pair in lora.pairs.items():
        if pair.r != first.r:
            ranks[path] = pair.r
        if pair.alpha != first.alpha:
            alphas[path] = _as_int(pair.alpha)
    config = LoraConfig(
        r=first.r,
        lora_alpha=_as_int(first.alpha),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=lora.dropout,
        target_modules=list(lora.pairs) if lora.targets is None else lora.targets,
        task_type=lora.task,
        base_model_name_or_path=hints.model or lora.base,
        inference_mode=True,
    )
    write_tensors(directory / WEIGHTS_NAME, lora.tensors(".lora_A.weight", ".lora_B.weight", PREFIX))
    config.save_pretrained(directory)


def _as_int(alpha: float) -> int | float:
    """The same number, an int if it is whole."""
    return int(alpha) if float(alpha).is_integer() else alpha
