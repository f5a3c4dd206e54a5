"""AdapterHub's layout (`adapters`): `adapter_config.json`, with `adapter.safetensors` or `pytorch_adapter.bin`.

    <path>.loras.<adapter name>.lora_A (r, in), .lora_B (out, r)

Its config says where by roles: matrices of the attention (q, k, v) and two layers of the MLP, the same in every layer
that is not left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, listing
from ..files.read import read_json
from .lora import Hints, Lora, Pair, find, number, paired, read_tensors, write_settings, write_tensors

name = "adapterhub"
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
FILES = (WEIGHTS, "pytorch_adapter.bin")
ADAPTER = "veneer"
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
"""What its config calls the modules of a layer, by architecture."""
LAYER = re.compile(r"(.*\.)?layers?\.(\d+)\.(.+)")


def is_here(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and find(directory, *FILES) is not None


def read(directory: Path, hints: Hints) -> Lora:
    file, path = find(directory, *FILES), directory / CONFIG
    assert file is not None
    content = read_json(path)
    settings = content.get("config")
    if not isinstance(settings, dict) or settings.get("architecture") != "lora":
        raise ConfigError(f"{str(path)!r} is no LoRA adapter of AdapterHub")
    _check_plain(settings, path)
    alpha = number(settings, "alpha", path)
    tensors, _ = read_tensors(file, hints.allow_pickle)
    found = paired(tensors, (".lora_A", ".lora_B"), file)
    names = {key: re.fullmatch(r"(.+)\.loras\.([^.]+)", key) for key in found}
    strange = [key for key, match in names.items() if match is None]
    if strange or len({match.group(2) for match in names.values() if match}) > 1:
        raise CheckpointError(f"{str(file)!r} holds several adapters, or none of AdapterHub's:{listing(names)}")
    pairs = {match.group(1): Pair(*found[key], alpha) for key, match in names.items() if match}
    dropout = settings.get("dropout") or 0.0
    base = content.get("model_name")
    return Lora(pairs, base if isinstance(base, str) else hints.model, None, float(dropout))


def _check_plain(settings: dict[str, Any], path: Path) -> None:
    plain = {"composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None}
    given = {key: settings[key] for key, value in plain.items() if settings.get(key, value) != value}
    if given:
        raise ConfigError(f"{str(path)!r}: {given} is more than LoRA, and has no place in other layouts")


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    lora.matrices_only(name)
    r, alpha = lora.one_rank(name)
    config = hints.config(lora.base, "AdapterHub's config describes the base model")
    roles, layers = _roles(lora, config)
    settings = {
        "architecture": "lora",
        "r": r,
        "alpha": alpha,
        "dropout": lora.dropout,
        "attn_matrices": sorted(roles & {"q", "k", "v"}, key="qkv".index),
        "selfattn_lora": bool(roles & {"q", "k", "v"}),
        "intermediate_lora": "intermediate" in roles,
        "output_lora": "output" in roles,
        "leave_out": sorted(set(range(config.num_hidden_layers)) - layers),
        **{"composition_mode": "add", "init_weights": "lora", "use_gating": False, "use_dora": False},
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
    ends = {"lora_A": "A", "lora_B": "B"}
    write_tensors(
        directory / WEIGHTS,
        {f"{p}.loras.{ADAPTER}.{e}": getattr(pair, side) for p, pair in lora.pairs.items() for e, side in ends.items()},
    )
    write_settings(directory / CONFIG, content)


def _roles(lora: Lora, config: Any) -> tuple[set[str], set[int]]:
    """(the roles of the adapted modules, the layers they lie in); each of the layers must have all of the roles."""
    known = ROLES.get(config.model_type)
    if known is None:
        raise ConfigError(f"AdapterHub's names for {config.model_type} are not known here; known: {', '.join(ROLES)}")
    places: dict[int, set[str]] = {}
    for path in lora.pairs:
        found = LAYER.fullmatch(path)
        if found is None or found.group(3) not in known:
            raise ConfigError(
                f"AdapterHub puts no LoRA on {path!r}; on {config.model_type} it does on:{listing(known)}"
            )
        places.setdefault(int(found.group(2)), set()).add(known[found.group(3)])
    roles = set().union(*places.values())
    uneven = [f"layer {i}: {', '.join(sorted(own))}" for i, own in places.items() if own != roles]
    if uneven:
        raise ConfigError(
            f"AdapterHub adapts the same modules in each layer ({', '.join(sorted(roles))}):{listing(uneven)}"
        )
    return roles, set(places)
