"""torchtune's own layout: `adapter_model.safetensors` or `.pt` under its module names, and `adapter_config.json`.

    layers.N.attn.q_proj.lora_a.weight (r, in), .lora_b.weight (out, r)

Its rotary embedding of the Llama family pairs neighbouring features, transformers' those half a head apart: the rows of
the query's and key's B are dealt anew, for which the number of heads must be known.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, ConfigError, listing
from ..files.read import read_json
from .lora import Hints, Lora, Pair, find, has_key, number, paired, read_tensors, write_settings, write_tensors

name = "torchtune"
CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter*.safetensors", "adapter_model.pt", "adapter*.pt")
THEIRS = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
    "lm_head": "output",
}
OURS = {theirs: ours for ours, theirs in THEIRS.items()}
TURNED = {"llama", "mistral", "gemma2"}
"""Architectures whose queries and keys are dealt anew."""
STRAIGHT = {"qwen2"}


def is_here(directory: Path) -> bool:
    file = find(directory, *FILES)
    config = directory / CONFIG
    if file is None or not config.is_file():
        return False
    if file.suffix == ".pt":
        return True
    return has_key(file, ".lora_a.weight")


def read(directory: Path, hints: Hints) -> Lora:
    file, settings = find(directory, *FILES), read_json(directory / CONFIG)
    assert file is not None
    alpha = number(settings, "lora_alpha", directory / CONFIG)
    tensors, _ = read_tensors(file, hints.allow_pickle)
    if any(key.endswith(".magnitude") for key in tensors):
        raise ConfigError(f"{str(file)!r} is a DoRA, which only PEFT's layout holds")
    base = settings.get("base_model_name_or_path")
    heads = _heads(hints.config(base, "torchtune's layout depends on the number of heads"))
    pairs = {}
    for key, (a, b) in paired(tensors, (".lora_a.weight", ".lora_b.weight"), file).items():
        path = _translated(key, OURS)
        pairs[path] = Pair(a, _dealt(b, heads, path, back=True), alpha)
    return Lora(pairs, base if isinstance(base, str) else hints.model, "CAUSAL_LM")


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    lora.matrices_only(name)
    r, alpha = lora.one_rank(name)
    heads = _heads(hints.config(lora.base, "torchtune's layout depends on the number of heads"))
    tensors: dict[str, Tensor] = {}
    for path, pair in lora.pairs.items():
        theirs = _translated(path, THEIRS)
        tensors |= {f"{theirs}.lora_a.weight": pair.A, f"{theirs}.lora_b.weight": _dealt(pair.B, heads, path)}
    targets = sorted({key.rsplit(".", 3)[-3] for key in tensors})
    settings = {"r": r, "lora_alpha": alpha, "target_modules": targets, "peft_type": "LORA"}
    write_settings(directory / CONFIG, settings | {"base_model_name_or_path": hints.model or lora.base})
    write_tensors(directory / "adapter_model.safetensors", tensors)


def _translated(path: str, names: dict[str, str]) -> str:
    found = re.fullmatch(r"(?:model\.)?(layers\.\d+\.)?(.+)", path)
    assert found is not None
    layer, rest = found.group(1) or "", found.group(2)
    if rest not in names:
        raise CheckpointError(f"torchtune has no name for {path!r}; it knows, in each layer:{listing(names)}")
    return ("model." if names is OURS and layer else "") + layer + names[rest]


def _heads(config: Any) -> dict[str, tuple[int, int]]:
    """(number of heads, features of one) of the projections that are dealt anew."""
    if config.model_type in STRAIGHT:
        return {}
    if config.model_type not in TURNED:
        known = ", ".join(sorted(TURNED | STRAIGHT))
        raise ConfigError(f"torchtune's layout of {config.model_type} is not known here; known are {known}")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {"q_proj": (config.num_attention_heads, size), "k_proj": (keys, size)}


def _dealt(B: Tensor, heads: dict[str, tuple[int, int]], path: str, back: bool = False) -> Tensor:
    """B (out, r) with the two halves of each head interleaved, as torchtune's rotary embedding takes them."""
    place = heads.get(path.rpartition(".")[2])
    if place is None:
        return B
    n, size = place
    if B.shape[0] != n * size or size % 2:
        raise CheckpointError(f"{path}: {B.shape[0]} outputs are not {n} heads of {size}; is it the right base model?")
    inner = (size // 2, 2) if back else (2, size // 2)
    return B.unflatten(0, (n, *inner)).transpose(1, 2).flatten(0, 2).contiguous()
