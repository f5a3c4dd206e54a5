"""How PEFT sorts the modules of a model into categories that play one part in every layer."""

from __future__ import annotations

from collections.abc import Iterable


def category(path: str) -> str:
    """The last two parts of a path, `self_attn_q_proj`; the last alone below an index, or where there is no other."""
    *_, outer, block, name = ["", "", *path.split(".")]
    if (outer, block, name) == ("attention", "output", "dense"):
        return "attention_output"
    return name if not block or block.isdigit() else f"{block}_{name}"


def layer_number(path: str, otherwise: int) -> int:
    """The index after `layers`, else the first index in a path."""
    _, found, rest = f".{path}.".partition(".layers.")
    numbers = [part for part in path.split(".") if part.isdigit()]
    following = rest.split(".")[0] if found else ""
    return int(following) if following.isdigit() else int(numbers[0]) if numbers else otherwise


def by_category(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths by category, in the order of their layers; of several in one layer the last."""
    found: dict[str, dict[int, str]] = {}
    for i, path in enumerate(paths):
        found.setdefault(category(path), {})[layer_number(path, i)] = path
    return {name: [path for _, path in sorted(layers.items())] for name, layers in sorted(found.items())}
