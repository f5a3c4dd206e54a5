"""torchtune's layout: `adapter_model.safetensors` or `.pt` with torchtune's module names, and `adapter_config.json`.

    layers.N.attn.q_proj.lora_a.weight (r, in), .lora_b.weight (out, r)

For the Llama family, torchtune's rotary embedding pairs neighbouring features, that of transformers features half a
head apart. The rows of B for queries and keys are permuted accordingly, which requires the number of heads.
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
PERMUTED = {"llama", "mistral", "gemma2"}
"""Architectures whose queries and keys are permuted."""
UNPERMUTED = {"qwen2"}


def is_here(directory: Path) -> bool:
    file = find(directory, *FILES)
    config = directory / CONFIG
    if file is None or not config.is_file():
        return False
    if file.suffix == ".pt":
        return True
    return has_key(file, ".lora_a.weight")


def read(directory: Path, hints: Hints) -> Lora:
    file = find(directory, *FILES)
    settings = read_json(directory / CONFIG)
    assert file is not None
    alpha = number(settings, "lora_alpha", directory / CONFIG)
    tensors, _ = read_tensors(file, hints.allow_pickle)
    if any(key.endswith(".magnitude") for key in tensors):
        raise ConfigError(f"{str(file)!r} is a DoRA adapter; converting DoRA is not supported")
    base = settings.get("base_model_name_or_path")
    heads = _heads(hints.config(base, "torchtune's layout depends on the number of heads"))
    pairs = {}
    for key, (A, B) in paired(tensors, (".lora_a.weight", ".lora_b.weight"), file).items():
        path = _our_path(key)
        pairs[path] = Pair(A, _permuted(B, heads, path, back=True), alpha)
    if not isinstance(base, str):
        base = hints.model
    return Lora(pairs, base, "CAUSAL_LM")


def write(lora: Lora, directory: Path, hints: Hints) -> None:
    lora.matrices_only(name)
    r, alpha = lora.one_rank(name)
    heads = _heads(hints.config(lora.base, "torchtune's layout depends on the number of heads"))
    tensors: dict[str, Tensor] = {}
    targets = set()
    for path, pair in lora.pairs.items():
        theirs = _their_path(path)
        tensors[f"{theirs}.lora_a.weight"] = pair.A
        tensors[f"{theirs}.lora_b.weight"] = _permuted(pair.B, heads, path)
        targets.add(theirs.rpartition(".")[2])
    settings = {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "peft_type": "LORA",
        "base_model_name_or_path": hints.model or lora.base,
    }
    write_settings(directory / CONFIG, settings)
    write_tensors(directory / "adapter_model.safetensors", tensors)


def _our_path(path: str) -> str:
    """A module's path in transformers."""
    layer, name = _translated(path, OURS)
    return f"model.{layer}{name}" if layer else name


def _their_path(path: str) -> str:
    """A module's path in torchtune."""
    layer, name = _translated(path, THEIRS)
    return layer + name


def _translated(path: str, names: dict[str, str]) -> tuple[str, str]:
    """("layers.N." or "", the translated rest of the path)."""
    match = re.fullmatch(r"(?:model\.)?(layers\.\d+\.)?(.+)", path)
    assert match is not None
    layer = match.group(1) or ""
    rest = match.group(2)
    if rest not in names:
        raise CheckpointError(f"torchtune has no name for {path!r}; in each layer it supports:{listing(names)}")
    return layer, names[rest]


def _heads(config: Any) -> dict[str, tuple[int, int]]:
    """(number of heads, features of one) of the projections that are permuted."""
    if config.model_type in UNPERMUTED:
        return {}
    if config.model_type not in PERMUTED:
        known = ", ".join(sorted(PERMUTED | UNPERMUTED))
        raise ConfigError(f"torchtune's layout for {config.model_type} is not known to veneer; supported: {known}")
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"q_proj": (heads, size), "k_proj": (key_heads, size)}


def _permuted(B: Tensor, heads: dict[str, tuple[int, int]], path: str, back: bool = False) -> Tensor:
    """B (out, r) with the two halves of each head interleaved for torchtune, or back in transformers' order."""
    module = path.rpartition(".")[2]
    if module not in heads:
        return B
    n, size = heads[module]
    if B.shape[0] != n * size or size % 2:
        raise CheckpointError(
            f"{path}: {B.shape[0]} outputs are not {n} heads of size {size}; is this the right base model?"
        )
    half = size // 2
    shape = (n, half, 2) if back else (n, 2, half)
    permuted = B.unflatten(0, shape).transpose(1, 2)
    return permuted.flatten(0, 2).contiguous()
