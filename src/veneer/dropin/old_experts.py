"""Adapters for mixtures of experts from before transformers 5: there each expert's matrices were linear layers of
their own, now those of all experts are one parameter, with the gate and up projections in one matrix.

A LoRA that names the old layers is put on the parameters: W1 + B1 A1 and W3 + B3 A3 of [W1; W3] are one update of twice
the rank, [A1; A3] and block-diagonal B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..targets.roles import head_paths, is_linear
from ..targets.walk import walk
from .configs import Names

HALVES = (("w1", "w3"), ("gate_proj", "up_proj"))
"""What the two halves of the fused matrix were called."""
OLD = {"w1": "gate_up_proj", "w3": "gate_up_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
OLD |= {"w2": "down_proj", "down_proj": "down_proj", "gate": "gate.weight"}
"""Today's parameter of each old layer."""


def experts(model: nn.Module) -> list[str]:
    """Paths of the modules that hold all experts' matrices."""
    shapes = {path: {n: p.dim() for n, p in m._parameters.items() if p is not None} for path, m in walk(model)}
    return [path for path, own in shapes.items() if own.get("gate_up_proj") == 3 and own.get("down_proj") == 3]


def modernise(model: nn.Module, config: Any) -> None:
    """Let a LoRA's targets mean the fused parameters where they name layers that these have replaced.

    Raises:
        ConfigError: one half of a fused matrix is named without the other.
    """
    is_lora = getattr(config.peft_type, "value", None) == "LORA"
    if not is_lora or not config.target_modules or not hasattr(model, "config") or not experts(model):
        return
    named = _named(model, config)
    old = {name for name in named if name.rpartition(".")[2] in OLD}
    if not named or (not old and not isinstance(config.target_modules, str)):
        return
    leaves = {name.rpartition(".")[2] for name in old}
    config.target_modules = Names(named - old)
    config.target_parameters = sorted({*(config.target_parameters or ()), *(OLD[leaf] for leaf in leaves)}) or None
    for halves in HALVES:
        _double(config, [half for half in halves if half in leaves], halves)


def _named(model: nn.Module, config: Any) -> set[str]:
    """What the targets name; of a pattern the last parts of all that it fits, old layers too."""
    targets = config.target_modules
    if not isinstance(targets, str):
        return set(targets)
    if targets.lower() == "all-linear":
        modules = dict(walk(model))
        heads = head_paths(model, modules)
        linear = {path.rpartition(".")[2] for path, m in modules.items() if is_linear(m) and path not in heads}
        return linear | {"gate", "gate_proj", "up_proj", "down_proj"}
    paths = [*(path for path, _ in walk(model)), *(f"{p}.{n}" for p, m in walk(model) for n in m._parameters)]
    paths += [f"{path}.{name}" for path in experts(model) for name in OLD]
    return {path.rpartition(".")[2] for path in paths if re.fullmatch(targets, path)}


def _double(config: Any, present: list[str], halves: tuple[str, str]) -> None:
    if not present:
        return
    missing = [half for half in halves if half not in present]
    if missing:
        raise ConfigError(
            f"Cannot convert PEFT target(s) {present[0]} without also targeting {missing[0]} because they are fused "
            "into gate_up_proj."
        )
    config.rank_pattern = {**(config.rank_pattern or {}), r".*\.gate_up_proj": config.r * 2}
    config.alpha_pattern = {**(config.alpha_pattern or {}), r".*\.gate_up_proj": config.lora_alpha * 2}


# Files

KEY = re.compile(r"(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.lora_([AB])(?:\.\w+)?\.weight$")


def modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, with those of single experts gathered as the fused parameters have them."""
    found: dict[tuple[str, str], dict[str, dict[int, Tensor]]] = {}
    rest: dict[str, Tensor] = {}
    for old, t in tensors.items():
        key = old.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's blocks before transformers 5
        match = KEY.match(key)
        if match is None:
            rest[key] = t
        else:
            path, number, name, side = match.groups()
            found.setdefault((path, side), {}).setdefault(name, {})[int(number)] = t
    for (path, side), by_name in found.items():
        stacks = {name: torch.stack([t for _, t in sorted(of.items())]) for name, of in by_name.items()}
        for name, stack in _joined(stacks, side).items():
            rest[f"{path}{'.base_layer' if name == 'gate_up_proj' else ''}.lora_{side}.weight"] = flat(stack, side)
    return rest


def _joined(stacks: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """(experts, ., .) by today's parameter; the halves as one."""
    halves = [stacks[name] for pair in HALVES for name in pair if name in stacks]
    found = {"gate_up_proj": both(halves, side)} if halves else {}
    return found | {OLD[name]: stack for name, stack in stacks.items() if OLD[name] == "down_proj"}


def both(halves: list[Tensor], side: str) -> Tensor:
    if side == "A":
        return torch.cat(halves, dim=1)
    return torch.stack([torch.block_diag(*of) for of in zip(*halves, strict=True)])


def flat(stack: Tensor, side: str) -> Tensor:
    """In the file A's rows are ordered by expert, then rank; B's columns by rank, then expert."""
    if side == "A":
        return stack.flatten(0, 1)
    return stack.permute(1, 2, 0).flatten(1)


def any_old(keys: Iterable[str]) -> bool:
    return any(KEY.match(key) for key in keys)
