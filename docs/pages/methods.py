"""The page of each method, made from its source file and from what was measured; their index by purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.core.config import all_methods
from veneer.model.catalogue import Page, page, pages

MEASURED = Path(__file__).parent.parent / "methods.json"
GROUPS: dict[str, list[str]] = {
    "Low-rank updates": [
        *("lora", "dora", "adalora", "lora_bias", "alora", "adamss", "bdlora", "deft", "delora", "gralora", "kasa"),
        *("mica", "miss", "monteclora", "qalora", "velora"),
    ],
    "The smallest files": ["vera", "pvera", "unilora", "tinylora", "vblora"],
    "High-rank updates": [
        *("hira", "loha", "lokr", "randlora", "fourierft", "waveft", "c3a", "shira", "supertuning", "glora"),
        *("peanut", "frod"),
    ],
    "Keep what the model knows": ["oft", "boft", "hra", "road", "osf", "psoft"],
    "Learned inputs": [
        *("prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning", "cpt", "cartridge"),
        "adaption_prompt",
    ],
    "Small networks between the layers": [
        *("bottleneck", "seq_bn", "seq_bn_inv", "double_seq_bn", "double_seq_bn_inv", "par_bn", "adapter_plus"),
        *("compacter", "compacter_plus_plus", "shadow"),
    ],
    "Edits of hidden states": ["loreft", "noreft", "direft"],
    "Biases, scales and words": ["bitfit", "beft", "ia3", "ln_tuning", "trainable_tokens"],
    "Several tasks": ["poly", "mtl_lora", "lily"],
    "Adapters together": ["mam", "unipelt", "union", "fusion", "average", "split", "xlora", "arrow"],
}
"""The methods by purpose, in the order of choosing.md. Each method is in one group."""


def generated() -> dict[str, str]:
    """The Markdown of each page by its path in docs/."""
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    result = {path(name): markdown(shown, measured) for name, shown in pages().items()}
    result["methods/index.md"] = index()
    return result


def navigation() -> list[dict[str, list[str]]]:
    """An entry of mkdocs' navigation for each group."""
    check_groups()
    return [{title: [path(name) for name in names]} for title, names in GROUPS.items()]


def check_groups() -> None:
    """Raise ValueError unless each method is in one group."""
    named = sorted(name for names in GROUPS.values() for name in names)
    if named != sorted(all_methods()):
        wrong = sorted(set(named) ^ set(all_methods())) or sorted(name for name in named if named.count(name) > 1)
        raise ValueError(f"docs/pages/methods.py: each method belongs to one group of GROUPS; look at {wrong}")


def path(name: str) -> str:
    return f"methods/{name}.md"


def index() -> str:
    """All methods, a table for each group."""
    parts = [
        "# All methods",
        f"veneer has {len(all_methods())} methods. [Choose a method](../choosing.md) says which one fits a task, and "
        "the [measured table](../methods-table.md) compares all of them on one.",
    ]
    for title, names in GROUPS.items():
        rows = [f"| [{name}]({name}.md) | {claim(page(name))} | {page(name).paper} |" for name in names]
        parts.append("\n".join([f"## {title}", "", "| method | what it does | paper |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


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
