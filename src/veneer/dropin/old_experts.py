"""Load LoRAs for mixtures of experts from before transformers 5 onto the fused parameters of transformers 5.

Before transformers 5, each matrix of each expert was a separate linear layer. Since then, one parameter holds the
matrices of all experts, and the gate and up projections are fused. A LoRA for the old layers is converted: the updates
W1 + B1 A1 and W3 + B3 A3 of [W1; W3] become one update of twice the rank, with [A1; A3] and a block-diagonal B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..targets.roles import head_paths, is_linear
from ..targets.walk import walk
from ..upstream.conversions import expert_family
from .configs import Names

EXACT_TARGETS = "exact_targets"
"""Set on a config whose targets name modules of today's architecture alone."""
HALVES = {"mixtral": ("w1", "w3"), "qwen2_moe": ("gate_proj", "up_proj")}
"""The old names of the two halves of the fused matrix, by family of architectures."""
OLD = {
    "mixtral": {
        "w1": "gate_up_proj",
        "w3": "gate_up_proj",
        "w2": "down_proj",
        "gate": "gate.weight",
    },
    "qwen2_moe": {
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
        "gate": "gate.weight",
    },
}
"""Old layers by family, each with the fused parameter that contains its weight."""
LAYERS = OLD["mixtral"] | OLD["qwen2_moe"]


def experts(model: nn.Module) -> list[str]:
    """The paths of the modules that hold the matrices of all experts."""
    paths = []
    for path, module in walk(model):
        dims = {name: p.dim() for name, p in module._parameters.items() if p is not None}
        if dims.get("gate_up_proj") == 3 and dims.get("down_proj") == 3:
            paths.append(path)
    return paths


def family(model: nn.Module) -> str | None:
    """The family of a model whose old layers are converted; None for others, whose targets mean real modules."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = expert_family(model_type)
    return name if name in OLD else None


def modernise(model: nn.Module, config: Any) -> None:
    """Replace, in a LoRA's config, targets that name old layers by the fused parameters.

    Raises:
        ConfigError: one half of a fused matrix is targeted without the other.
    """
    is_lora = getattr(config.peft_type, "value", None) == "LORA"
    architecture = family(model)
    if not is_lora or not config.target_modules or architecture is None:
        return
    old = OLD[architecture]
    targets = _targets(model, config, old)
    parameters = set(config.target_parameters or ())
    old_targets = set()
    old_layers = set()
    for name in targets:
        layer = _last_part(name)
        if layer in old:
            old_targets.add(name)
            old_layers.add(layer)
            parameters.add(old[layer])
    if not targets or (not old_targets and not isinstance(config.target_modules, str)):
        return
    config.target_modules = Names(targets - old_targets)
    config.target_parameters = sorted(parameters) or None
    _double_rank(config, HALVES[architecture], old_layers)


def _last_part(path: str) -> str:
    return path.rpartition(".")[2]


def _targets(model: nn.Module, config: Any, old: Mapping[str, str]) -> set[str]:
    """The names in a config's targets; for a pattern, the last parts of all paths that it matches, old layers' too."""
    targets = config.target_modules
    if not isinstance(targets, str):
        return set(targets)
    if targets.lower() == "all-linear":
        return _linear_layers(model) | old.keys()
    paths = []
    for path, module in walk(model):
        paths.append(path)
        paths += [f"{path}.{name}" for name in module._parameters]
    for path in experts(model):
        paths += [f"{path}.{name}" for name in old]
    return {_last_part(path) for path in paths if re.fullmatch(targets, path)}


def _linear_layers(model: nn.Module) -> set[str]:
    """The names of a model's linear layers other than its head."""
    modules = dict(walk(model))
    heads = head_paths(model, modules)
    names = set()
    for path, module in modules.items():
        if is_linear(module) and path not in heads:
            names.add(_last_part(path))
    return names


def _double_rank(config: Any, halves: tuple[str, str], old_layers: set[str]) -> None:
    """Give the fused matrix twice the rank and alpha if its halves are targeted."""
    present = [half for half in halves if half in old_layers]
    if not present:
        return
    missing = [half for half in halves if half not in old_layers]
    if missing:
        raise ConfigError(
            f"Cannot convert PEFT target(s) {present[0]} without also targeting {missing[0]} because they are fused "
            "into gate_up_proj."
        )
    config.rank_pattern = {**(config.rank_pattern or {}), r".*\.gate_up_proj": config.r * 2}
    config.alpha_pattern = {**(config.alpha_pattern or {}), r".*\.gate_up_proj": config.lora_alpha * 2}


# Files

KEY = re.compile(r"(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.lora_([AB])(?:\.\w+)?\.weight$")
"""The key of one expert's factor: path, expert, layer, side."""


def modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, with the factors of single experts joined into factors of the fused parameters."""
    modern_tensors: dict[str, Tensor] = {}
    factors: dict[tuple[str, str], dict[str, dict[int, Tensor]]] = {}  # by path and side, old layer, expert
    for old_key, tensor in tensors.items():
        key = old_key.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's blocks before transformers 5
        match = KEY.match(key)
        if match is None:
            modern_tensors[key] = tensor
            continue
        path, expert, layer, side = match.groups()
        by_layer = factors.setdefault((path, side), {})
        by_layer.setdefault(layer, {})[int(expert)] = tensor
    for (path, side), by_layer in factors.items():
        for parameter, stack in _joined(by_layer, side).items():
            prefix = f"{path}.base_layer" if parameter == "gate_up_proj" else path
            modern_tensors[f"{prefix}.lora_{side}.weight"] = flat(stack, side)
    return modern_tensors


def _joined(by_layer: dict[str, dict[int, Tensor]], side: str) -> dict[str, Tensor]:
    """The factors of the fused parameters, each (experts, rows, columns), from the factors by old layer and expert."""
    stacks = {}
    for layer, by_expert in by_layer.items():
        stacks[layer] = torch.stack([by_expert[expert] for expert in sorted(by_expert)])
    joined = {}
    halves = []
    for names in HALVES.values():
        halves += [stacks[name] for name in names if name in stacks]
    if halves:
        joined["gate_up_proj"] = both(halves, side)
    for layer, stack in stacks.items():
        if LAYERS[layer] == "down_proj":
            joined["down_proj"] = stack
    return joined


def both(halves: list[Tensor], side: str) -> Tensor:
    """The factors (experts, rows, columns) of two halves as one of twice the rank; B is block-diagonal."""
    if side == "A":
        return torch.cat(halves, dim=1)
    return torch.stack([torch.block_diag(*blocks) for blocks in zip(*halves, strict=True)])


def flat(stack: Tensor, side: str) -> Tensor:
    """A file's matrix from a stack of factors: A's rows are by expert, then rank; B's columns by rank, then expert."""
    if side == "A":
        return stack.flatten(0, 1)
    return stack.permute(1, 2, 0).flatten(1)


def any_old(keys: Iterable[str]) -> bool:
    """Whether any key of a file is that of a single expert's factor."""
    return any(KEY.match(key) for key in keys)
