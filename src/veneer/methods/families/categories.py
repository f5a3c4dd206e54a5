"""Module categories as in PEFT: a category contains the modules that have the same role in different layers."""

from __future__ import annotations

from collections.abc import Iterable


def category(path: str) -> str:
    """The category of a module: the last two parts of its path, as in `self_attn_q_proj`.

    If the path has only one part, or the part before the last is an index, it is the last part alone.
    """
    *_, outer, block, name = ["", "", *path.split(".")]
    if (outer, block, name) == ("attention", "output", "dense"):
        return "attention_output"
    if not block or block.isdigit():
        return name
    return f"{block}_{name}"


def layer_number(path: str, otherwise: int) -> int:
    """The index that follows `layers` in a path, else the first index in it, else `otherwise`."""
    parts = path.split(".")
    if "layers" in parts:
        following = parts[parts.index("layers") + 1 :]
        if following and following[0].isdigit():
            return int(following[0])
    for part in parts:
        if part.isdigit():
            return int(part)
    return otherwise


def by_category(paths: Iterable[str]) -> dict[str, list[str]]:
    """Group paths by category and sort them by layer. If a layer has several in one category, the last is used."""
    grouped: dict[str, dict[int, str]] = {}
    for i, path in enumerate(paths):
        layers = grouped.setdefault(category(path), {})
        layers[layer_number(path, i)] = path

    ordered = {}
    for name in sorted(grouped):
        layers = grouped[name]
        ordered[name] = [layers[number] for number in sorted(layers)]
    return ordered
