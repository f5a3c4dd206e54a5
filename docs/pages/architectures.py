"""The page of architectures, made from what `python -m tests.architectures` found."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

FOUND = Path(__file__).parent.parent / "architectures.json"
MARKS = {"holds": "✓", "refused": "✗", "model": "–", "fault": "**fault**"}
COLUMNS = {
    "default targets": "`LoraConfig()` finds its targets",
    "save, load, merge": "LoRA saved and loaded, or merged, gives the same outputs; disabled or unloaded, the base's",
    "all-linear": 'the same with `target_modules="all-linear"`',
    "generate": "LoRA: generation with a cache gives the logits of generation without",
    "mixed batch": "two adapters in one batch give what each gives alone",
    "checkpointing": "gradient checkpointing gives the same gradients",
    "fast paths": "the fast paths give the loss and the gradients of the plain ones, padded and not",
    "padding": "a row gives the same logits alone and in a padded batch",
    "prompt tuning": "cached generation equals uncached",
    "p-tuning": "the same",
    "cpt": "the same",
    "prefix tuning": "the same",
    "cartridge": "the same",
    "shadow": "the same",
}


def generated() -> dict[str, str]:
    """The Markdown of the page by its path in docs/."""
    if not FOUND.exists():
        return {}
    return {"reference/architectures.md": markdown(json.loads(FOUND.read_text()))}


def markdown(found: dict[str, Any]) -> str:
    """The page: what was checked, a row for each model class, the reasons of refusals, and what was not tried."""
    tried = [row for row in found["architectures"] if not row["not_built"]]
    untried = [row for row in found["architectures"] if row["not_built"]]
    outcomes = Counter(kind for row in tried for kind, _ in row["checks"].values())
    lines = [
        "# Architectures",
        "",
        f"Every model class of transformers {found['transformers']} that generates text from text: "
        f"{len(found['architectures'])} classes, of which {len(tried)} could be built tiny from their config class and "
        f"tried. Of {sum(outcomes.values()):,} checks, {outcomes['holds']:,} hold, {outcomes['refused']} are refused "
        f"with an error that says why, {outcomes['model']} say nothing of veneer because the model does "
        f"not pass them without an adapter, and {outcomes['fault']} fail. `make architectures` repeats them.",
        "",
        *(f"- **{name}**: {what}" for name, what in COLUMNS.items()),
        "",
        "✓ holds, ✗ is refused, – the model itself does not do it",
        "",
        "| class | " + " | ".join(COLUMNS) + " |",
        "|---|" + ":-:|" * len(COLUMNS),
    ]
    for row in tried:
        marks = [MARKS[row["checks"][name][0]] for name in COLUMNS]
        lines.append(f"| {row['class']} | " + " | ".join(marks) + " |")
    lines += ["", "## What is refused, and why", "", *_reasons(tried)]
    lines += ["", "## What was not tried", "", *(f"- {row['class']}: {_plain(row['not_built'])}" for row in untried)]
    return "\n".join(lines) + "\n"


def _reasons(tried: list[dict[str, Any]]) -> list[str]:
    """One entry for each class and reason, with the checks that it ends."""
    lines = []
    for row in tried:
        checks_by_reason: dict[str, list[str]] = {}
        for name, (kind, why) in row["checks"].items():
            if kind == "refused":
                checks_by_reason.setdefault(why, []).append(name)
        for why, names in checks_by_reason.items():
            lines.append(f"- {row['class']}, {', '.join(names)}: {_plain(why)}")
    return lines


def _plain(text: str) -> str:
    """Text of an error message that Markdown does not read as its own."""
    return f"`{text.replace('`', chr(39))}`"
