"""Module categories, as PEFT forms them: one category holds the modules with the same role in every layer."""

from __future__ import annotations

from collections.abc import Iterable


def category(path: str) -> str:
    """The last two parts of a path, as in `self_attn_q_proj`.

    Only the last part if there is no other, or if the one before it is an index.
    """
    *_, outer, block, name = ["", "", *path.split(".")]
    if (outer, block, name) == ("attention", "output", "dense"):
        return "attention_output"
    if not block or block.isdigit():
        return name
    return f"{block}_{name}"


def layer_number(path: str, otherwise: int) -> int:
    """The index after `layers` in a path, else the first index, else `otherwise`."""
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
    """Paths grouped by category and sorted by layer; where one layer has several, the last is used."""
    grouped: dict[str, dict[int, str]] = {}
    for i, path in enumerate(paths):
        layers = grouped.setdefault(category(path), {})
        layers[layer_number(path, i)] = path

    ordered = {}
    for name in sorted(grouped):
        layers = grouped[name]
        ordered[name] = [layers[number] for number in sorted(layers)]
    return ordered
