"""The page of every method, made from its file when the site is built: `methods/NAME.md`, and their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from veneer.core.config import all_methods
from veneer.model.catalogue import Page, page, pages

MEASURED = Path(__file__).parent / "methods.json"


def on_files(files: Files, config: Any) -> Files:
    """mkdocs asks this for more files."""
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    for name, shown in pages().items():
        files.append(File.generated(config, f"methods/{name}.md", content=markdown(shown, measured)))
    files.append(File.generated(config, "methods/index.md", content=index()))
    return files


def index() -> str:
    rows = [f"| [{p.name}]({p.name}.md) | {claim(p)} | {p.paper} |" for p in pages().values()]
    return "\n".join(["# Methods", "", "| method | what it does | paper |", "|---|---|---|", *rows, ""])


def claim(p: Page) -> str:
    text = p.claim.partition(": ")[2] or p.claim
    return text[:1].upper() + text[1:]


def markdown(p: Page, measured: dict[str, Any]) -> str:
    parts = [f"# {p.name}", p.text, "## Use it", example(p), "## Facts", facts(p, measured), "## Settings", settings(p)]
    return "\n\n".join(parts) + "\n"


def example(p: Page) -> str:
    given = {"task_type": "CAUSAL_LM"} | dict(all_methods()[p.name].example) | p.recommended
    words = ", ".join(f"{key}={value!r}" for key, value in given.items())
    code = f"from veneer import {p.config}, get_peft_model\n\nmodel = get_peft_model(base, {p.config}({words}))"
    command = f"veneer train --model smollm2-135m-instruct --data rows.jsonl --output adapter --method {p.name}"
    return f"```python\n{code}\n```\n\n```sh\n{command}\n```"


def facts(p: Page, measured: dict[str, Any]) -> str:
    rows = {
        "Adapts": ", ".join(p.kinds),
        "Merges into the weights": "yes" if p.mergeable else "no",
        "Low-rank": "yes" if p.low_rank else "no",
        "Learning rate to start from": f"{p.learning_rate:g}",
    }
    if p.recommended:
        rows["Settings it is trained with, unless you say otherwise"] = _settings(p.recommended)
    rows |= numbers(p.name, measured)
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def numbers(name: str, measured: dict[str, Any]) -> dict[str, str]:
    """What `python -m bench.methods` has measured of it."""
    found = measured.get("veneer", {}).get(name, {})
    if "after" not in found:
        return {}
    gain = (measured["before"] - found["after"]) / (measured["before"] - measured["veneer"]["lora"]["after"])
    return {
        "Loss on the [comparison's task](../methods-table.md)": f"{found['after']:.3f}, {gain:.0%} of LoRA's gain",
        "Trained there": f"{found['trainable']:,} parameters, {found['file_bytes'] / 1e6:.2f} MB",
    }


def settings(p: Page) -> str:
    rows = [f"| `{f.name}` | `{_default(f.default)}` | {_cell(f.about)} |" for f in page(p.name).fields]
    return "\n".join(["| field | default | |", "|---|---|---|", *rows]) if rows else "None of its own."


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={value!r}`" for key, value in values.items())


def _default(value: Any) -> str:
    return _cell(repr(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
