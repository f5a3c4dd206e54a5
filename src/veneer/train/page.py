"""report.html: the facts of report.json as one self-contained page."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from ..model.card import Example
from ..terminal import duration, size, visible
from .charts import Curve, Point, curve
from .samples import CUT

PAGE_NAME = "report.html"
MOST_BARS = 32
"""Maximum number of bars of a histogram."""
MOST_NAMED = 4
"""Maximum number of classes or data sources that the title names."""
MOST_TYPED = 45
"""Maximum length of a prompt that the example of `veneer generate` repeats."""
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$\n?|\Z)", re.MULTILINE | re.DOTALL)
"""A block of code in Markdown, which may be unfinished."""
CODE_START = re.compile(
    r"""[\[{]\s*["'{\[]"""
    r"|(SELECT|INSERT|UPDATE|DELETE|CREATE|WITH)\b[^?!]*?\b(FROM|INTO|SET|TABLE|AS)\b"
    r"|\#include\b|<\w+[^>]*>|(def|class|function)\s+\w+\s*[(:{]"
)
CODE_LINE = re.compile(
    r"(\t|\ {2,})\S|(def|class|import|from|return|if|for|while|function|const|let|var)\b.*[:;({=]|.*[;{}]$"
)


@dataclass(frozen=True)
class Cell:
    """One layer in a map of layers."""

    share: float
    """Share of the largest value, 0 to 1; it decides the colour."""
    text: str


@dataclass
class Heat:
    """A map of layers: a row for each kind of module, a column for each depth."""

    title: str
    most: str
    depths: tuple[int, int] | None = None
    """The first and the last depth; None if there are no numbered layers."""
    rows: list[tuple[str, list[Cell | None]]] = field(default_factory=list)


class Piece(NamedTuple):
    """A part of an answer."""

    is_code: bool
    text: str


def templates() -> Any:
    """The jinja2 environment of veneer's pages. Every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "size": size, "clock": duration, "share": _share, "short": _short}
    environment.filters |= {"pieces": pieces, "breakable": _breakable, "finished": _minute}
    environment.filters["visible"] = visible
    return environment


def render(content: dict[str, Any]) -> str:
    """The page as HTML, from the content of report.json."""
    recipe = content["recipe"]
    template = templates().get_template(f"{PAGE_NAME}.j2")
    return template.render(
        r=content,
        task=task(content),
        name=_last(content["model"]),
        pairs=is_on_pairs(content),
        accuracy=_accuracy(content),
        measures=measures(content),
        curves=curves(content),
        heats=heats(content["layers"]),
        bars=bars(content["data"]["lengths"], recipe["max_length"]),
        recipe_text=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        output_text=json.dumps(recipe["output"], ensure_ascii=False),
        commands=commands(content),
    )


# What the run was for


def task(content: dict[str, Any]) -> str:
    """What was learned from which data, as the title of the page."""
    sources = [_last(source["path"]) for source in content["recipe"]["data"]]
    learned = "Answers"
    if is_on_pairs(content):
        learned = "Preferences"
    elif content["labels"]:
        learned = f"Classes ({_named(content['labels'])})"
    elif is_plain_text(content):
        learned = "Text"
    return f"{learned} learned from {_named(sources)}"


def is_on_pairs(content: dict[str, Any]) -> bool:
    """Whether each row has a chosen and a rejected answer."""
    return bool(content["recipe"]["objective"] != "sft")


def is_plain_text(content: dict[str, Any]) -> bool:
    """Whether all tokens that can be learned are, without a prompt; the first of a row cannot be."""
    data = content["data"]
    return content["recipe"]["loss_on"] == "assistant" and data["supervised_tokens"] == data["tokens"] - data["kept"]


def _named(names: Sequence[str]) -> str:
    """The names in a row, or their number if there are many."""
    if len(names) > MOST_NAMED:
        return f"{', '.join(names[: MOST_NAMED - 1])} and {len(names) - MOST_NAMED + 1} more"
    return ", ".join(names)


def _last(path: str) -> str:
    """The last part of a path or of a hub id."""
    return path.rstrip("/").rpartition("/")[2] or path


def commands(content: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(purpose, commands) for using the adapter from a shell."""
    output = shlex.quote(content["recipe"]["output"])
    merge = f"veneer merge {output} --out merged"
    use = [f"veneer eval --adapter {output} --data rows.csv", merge]
    if not content["labels"]:
        use = [*_asking(content, output), merge]
    again = shlex.quote(f"{content['recipe']['output']}/recipe.yaml")
    check = [f"veneer verify {output}", f"veneer inspect {output}", f"veneer train {again} --output again"]
    return [
        ("Use it, or write a plain model that needs no adapter:", use),
        ("Check, inspect or repeat the run:", check),
    ]


def _asking(content: dict[str, Any], output: str) -> list[str]:
    """The commands that ask the model, with the chat template of the run."""
    prompt = shlex.quote(typed_prompt(content["samples"]["rows"]))
    template = content["recipe"]["chat_template"]
    options = f" --chat-template {shlex.quote(template)}" if template else ""
    chat = f"veneer chat --adapter {output}{options}"
    if is_plain_text(content):
        options = " --raw"
    generate = f"veneer generate {prompt} --adapter {output}{options}"
    return [chat, generate] if content["chat_template"] else [generate]


def typed_prompt(rows: list[dict[str, Any]]) -> str:
    """The prompt of a sample that is short enough to be typed."""
    for row in rows:
        prompt = row["prompt"]
        is_short = 0 < len(prompt) <= MOST_TYPED
        if is_short and prompt.isprintable() and not prompt.startswith("-"):  # a dash would begin an option
            return str(prompt)
    return "a prompt"


def example_of(content: dict[str, Any]) -> Example | None:
    """What the card's code asks the model; None if the base model's tokenizer lacks the chat template of the run."""
    prompt = typed_prompt(content["samples"]["rows"])
    if content["labels"] is not None:
        return Example(prompt, tuple(content["labels"]))
    if is_plain_text(content):
        return Example(prompt)
    if content["recipe"]["chat_template"] is not None:
        return None
    if content["chat_template"]:
        return Example(prompt, is_chat=True)
    return Example(f"{prompt}\n")


# Curves


def curves(content: dict[str, Any]) -> list[Curve]:
    """Charts of loss, learning rate, speed and memory over the steps."""
    history = content["history"]
    evaluations = (content["eval"] or {}).get("history", [])
    marks = _series(evaluations, "loss")
    return [
        curve("Loss", _unit(content), _series(history, "loss"), marks, is_noisy=True, may_be_log=True),
        *_of_rewards(content, evaluations),
        curve("Learning rate", "rate", _series(history, "learning_rate"), floor=0.0),
        curve("Speed", "tokens per second", _series(history, "tokens_per_second"), floor=0.0, is_noisy=True),
        curve("Memory", "GB", _series(history, "rss_bytes", 1e-9), floor=0.0),
    ]


def _unit(content: dict[str, Any]) -> str:
    """What the loss is measured in."""
    if is_on_pairs(content):
        return f"{content['recipe']['objective']} loss per pair"
    return f"nats per {'row' if content['labels'] else 'token'}"


def _of_rewards(content: dict[str, Any], evaluations: list[dict[str, Any]]) -> list[Curve]:
    """Charts of what the rewards say of the pairs of a step; none for other objectives."""
    if not is_on_pairs(content):
        return []
    history = content["history"]
    right = _series(history, "reward_accuracy", 100)
    margin = _series(history, "reward_margin")
    return [
        curve("Chosen answer preferred", "% of pairs", right, _series(evaluations, "accuracy", 100), is_noisy=True),
        curve("Margin of the rewards", "reward", margin, _series(evaluations, "margin"), is_noisy=True),
    ]


def _series(history: list[dict[str, Any]], name: str, scale: float = 1.0) -> list[Point]:
    """(step, value) of each entry that has the value."""
    return [(entry["step"], entry[name] * scale) for entry in history if entry.get(name) is not None]


# Evaluations

SPELLED = {"loss": "{:.4f}".format, "accuracy": "{:.1%}".format}
"""How measures are written that need more than three digits, or are shares."""


def measures(content: dict[str, Any]) -> list[tuple[str, Callable[[float], str]]]:
    """The names of the measures of an evaluation, and how each is written."""
    names = content["eval"]["history"][0] if content["eval"] else {}
    return [(name, SPELLED.get(name, _short)) for name in names if name != "step"]


def _accuracy(content: dict[str, Any]) -> str:
    """What the accuracy of an evaluation is a share of."""
    if is_on_pairs(content):
        return "chosen answer preferred"
    return "accuracy" if content["labels"] else "token accuracy"


# Answers


def pieces(text: str) -> list[Piece]:
    """The prose and the code of an answer, in order: JSON, blocks between ``` and text that looks like code."""
    parts = []
    position = 0
    for match in FENCE.finditer(text):
        parts.append(_piece(text[position : match.start()]))
        parts.append(Piece(True, match[1].rstrip("\n")))
        position = match.end()
    parts.append(_piece(text[position:]))
    return [part for part in parts if part.text]


def _breakable(code: str) -> Markup:
    """Code as HTML whose lines may break after commas, as JSON without blanks has no other place."""
    return Markup(",<wbr>").join(code.split(","))  # join escapes the parts


def _piece(text: str) -> Piece:
    """Text outside of fences, with its line breaks at both ends removed."""
    text = text.strip("\n")
    return Piece(_is_code(text), text)


def _is_code(text: str) -> bool:
    """Whether a text is JSON, or reads like a program or markup."""
    text = text.strip().removesuffix(CUT)
    if CODE_START.match(text):
        return True
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) > 1 and 2 * sum(CODE_LINE.match(line) is not None for line in lines) > len(lines)


# Layers


def heats(layers: list[dict[str, Any]]) -> list[Heat]:
    """Maps of the size of each layer's update and of its effective rank."""
    if not layers:
        return []
    if all(layer["relative_norm"] is not None for layer in layers):
        maps = [_heat("Size of the update of each weight: |ΔW| / |W|", layers, "relative_norm", _portion)]
    else:
        maps = [_heat("Norm of each adapter's parameters", layers, "norm", _short)]
    if all(layer["effective_rank"] is not None for layer in layers):
        ranks = {layer["rank"] for layer in layers}
        limit = f" (of {ranks.pop()})" if len(ranks) == 1 else ""
        title = f"Effective rank of the update{limit}"
        maps.append(_heat(title, layers, "effective_rank", _one_digit))
    return maps


def _heat(title: str, layers: list[dict[str, Any]], measure: str, spell: Callable[[float], str]) -> Heat:
    """The map of one measure, whose values `spell` turns into text."""
    most = max(layer[measure] for layer in layers)
    rows: dict[str, dict[int | None, Cell]] = {}
    depths: set[int] = set()
    for layer in layers:
        kind, depth = _place(layer["path"])
        if depth is not None:
            depths.add(depth)
        share = round(layer[measure] / most, 3) if most else 0.0
        text = f"{layer['path']}: {spell(layer[measure])}, {layer['parameters']:,} parameters"
        rows.setdefault(kind, {})[depth] = Cell(share, text)
    names = _shortest(list(rows))
    heat = Heat(title, spell(most), (min(depths), max(depths)) if depths else None)
    for kind, cells in rows.items():
        columns: list[int | None] = [None] if None in cells else [*sorted(depths)]
        heat.rows.append((names[kind], [cells.get(depth) for depth in columns]))
    return heat


def _place(path: str) -> tuple[str, int | None]:
    """(kind of module, depth): model.layers.3.mlp.up_proj becomes (mlp.up_proj, 3)."""
    match = re.match(r"(?:.*?\.)??(\d+)(?:\.(.+))?$", path)
    if match is None:
        return path, None
    return match[2] or "block", int(match[1])


def _shortest(kinds: list[str]) -> dict[str, str]:
    """The last part of each name, or the whole name if several names have the same last part."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)}


# Data


def bars(lengths: dict[str, int], limit: int) -> dict[str, Any]:
    """A histogram of row lengths in tokens: heights in percent of the tallest, and which bars exceed the limit."""
    counts = {int(length): count for length, count in lengths.items()}
    if not counts:
        return {"bars": [], "low": 0, "high": 0}
    low = min(counts)
    high = max(counts)
    width = max(1, math.ceil((high - low + 1) / MOST_BARS))
    totals = [0] * ((high - low) // width + 1)
    for length, count in counts.items():
        totals[(length - low) // width] += count
    tallest = max(totals)
    histogram = []
    for i, total in enumerate(totals):
        first = low + i * width
        last = first + width - 1
        text = f"{first} to {last} tokens: {total:,} rows"
        histogram.append({"height": round(100 * total / tallest, 1), "text": text, "over": first > limit})
    return {"bars": histogram, "low": low, "high": low + len(totals) * width - 1}


# Words


def _count(value: int) -> str:
    """12,345 up to a million, then 1.23 M."""
    if value >= 1e9:
        return f"{value / 1e9:.3g} B"
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value:,}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _portion(value: float) -> str:
    return f"{value:.2%}" if value < 1 else _short(value)


def _one_digit(value: float) -> str:
    return f"{value:.1f}"


def _short(value: float | None) -> str:
    """Three digits, or a whole number from 100 on; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _minute(moment: str) -> str:
    """2026-05-01T12:34:56+00:00 becomes 2026-05-01 12:34 UTC."""
    return moment[:16].replace("T", " ") + " UTC"
