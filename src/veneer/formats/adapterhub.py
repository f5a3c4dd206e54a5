"""AdapterHub's layout (`adapters`): `adapter_config.json`, with `adapter.safetensors` or `pytorch_adapter.bin`.

    <path>.loras.<adapter name>.lora_A (r, in), .lora_B (out, r)

Its config names the adapted modules by roles: matrices of the attention (q, k, v) and two layers of the MLP, the same
in every transformer layer that is not listed in `leave_out`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError, listing
from ..files.read import read_json
from .lora import Hints, Lora, Pair, find, number, paired, read_tensors, write_settings, write_tensors

name = "adapterhub"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
FILES = (WEIGHTS, "pytorch_adapter.bin")
ADAPTER = "veneer"
"""The adapter name that is written."""
PLAIN = {"composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None}
"""Settings of a plain LoRA."""
LLAMA = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "mlp.down_proj": "intermediate",
    "mlp.up_proj": "output",
}
BERT = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}
ROLES = {"llama": LLAMA, "mistral": LLAMA, "bert": BERT, "roberta": BERT, "xlm-roberta": BERT}
"""The roles of a layer's modules, by architecture."""
LAYER = re.compile(r"(.*\.)?layers?\.(\d+)\.(.+)")


def is_here(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and find(directory, *FILES) is not None


def read(directory: Path, hints: Hints) -> Lora:
    path = directory / CONFIG
    content = read_json(path)
    settings = content.get("config")
    if not isinstance(settings, dict) or settings.get("architecture") != "lora":
        raise ConfigError(f"{str(path)!r} is not a LoRA adapter of AdapterHub")
    _check_plain(settings, path)
    alpha = number(settings, "alpha", path)
    pairs = {}
    for module, (A, B) in _factors(directory, hints).items():
        pairs[module] = Pair(A, B, alpha)
    dropout = float(settings.get("dropout") or 0.0)
    base = content.get("model_name")
    if not isinstance(base, str):
        base = hints.model
    return Lora(pairs, base, None, dropout)


def _check_plain(settings: dict[str, Any], path: Path) -> None:
    """Raise ConfigError if the settings are those of more than a plain LoRA."""
    others = {key: settings[key] for key, value in PLAIN.items() if settings.get(key, value) != value}
    if others:
        raise ConfigError(f"{str(path)!r}: {others} goes beyond plain LoRA; other layouts cannot store it")


def _factors(directory: Path, hints: Hints) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the modules' paths; raises CheckpointError unless the file holds exactly one adapter."""
    file = find(directory, *FILES)
    assert file is not None
    tensors, _ = read_tensors(file, hints.allow_pickle)
    factors = {}
    names = set()
    by_key = paired(tensors, (".lora_A", ".lora_B"), file)
    for key, pair in by_key.items():
        match = re.fullmatch(r"(.+)\.loras\.([^.]+)", key)
        path, adapter = match.groups() if match else (key, None)
        factors[path] = pair
        names.add(adapter)
    if None in names or len(names) > 1:
        raise CheckpointError(f"{str(file)!r} must hold exactly one adapter of AdapterHub; it has:{listing(by_key)}")
    return factors


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    lora.matrices_only(name)
    r, alpha = lora.one_rank(name)
    config = hints.config(lora.base, "AdapterHub's config describes the base model")
    roles, layers = _roles(lora, config)
    attention = [role for role in ("q", "k", "v") if role in roles]
    left_out = set(range(config.num_hidden_layers)) - layers
    settings = {
        "architecture": "lora",
        "r": r,
        "alpha": alpha,
        "dropout": lora.dropout,
        "attn_matrices": attention,
        "selfattn_lora": bool(attention),
        "intermediate_lora": "intermediate" in roles,
        "output_lora": "output" in roles,
        "leave_out": sorted(left_out),
        "composition_mode": "add",
        "init_weights": "lora",
        "use_gating": False,
        "use_dora": False,
    }
    content = {
        "config": settings,
        "hidden_size": config.hidden_size,
        "model_type": config.model_type,
        "model_name": hints.model or lora.base,
        "model_class": (config.architectures or [None])[0],
        "name": ADAPTER,
        "version": "adapters.1.3.0",
    }
    write_tensors(directory / WEIGHTS, lora.tensors(f".loras.{ADAPTER}.lora_A", f".loras.{ADAPTER}.lora_B"))
    write_settings(directory / CONFIG, content)


def _roles(lora: Lora, config: Any) -> tuple[set[str], set[int]]:
    """(the roles of the adapted modules, the numbers of their layers).

    Raises:
        ConfigError: AdapterHub has no role for a module, or the layers do not all have the same roles.
    """
    roles_of = ROLES.get(config.model_type)
    if roles_of is None:
        raise ConfigError(
            f"AdapterHub's names for {config.model_type} are not supported; supported: {', '.join(ROLES)}"
        )
    by_layer: dict[int, set[str]] = {}
    for path in lora.pairs:
        match = LAYER.fullmatch(path)
        if match is None or match.group(3) not in roles_of:
            raise ConfigError(
                f"AdapterHub has no LoRA for {path!r}; for {config.model_type} it supports:{listing(roles_of)}"
            )
        layer = int(match.group(2))
        by_layer.setdefault(layer, set()).add(roles_of[match.group(3)])
    roles = set().union(*by_layer.values())
    uneven = []
    for layer, own in by_layer.items():
        if own != roles:
            uneven.append(f"layer {layer}: {', '.join(sorted(own))}")
    if uneven:
        raise ConfigError(
            f"AdapterHub adapts the same modules in each layer ({', '.join(sorted(roles))}):{listing(uneven)}"
        )
    return roles, set(by_layer)
