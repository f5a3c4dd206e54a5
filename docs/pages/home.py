"""The parts of the home page that are made from measurements: the speed of training, and what a run taught a model."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from veneer.core.config import all_methods

DOCS = Path(__file__).parent.parent
SPEED = DOCS / "performance-train.json"
"""Written by `python -m bench.train`."""
DEMO = DOCS / "demo.json"
"""Written by `python docs/pictures.py`."""

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "gain": "{ratio} times PEFT's speed, in {memory} GB of memory; PEFT takes {peft_memory} GB",
        "machine": "Tokens per second in training. {cores} CPU cores, fp32, torch {torch}; medians of {pairs} runs.",
        "before": "before",
        "after": "after",
    },
    "zh": {
        "gain": "速度是 PEFT 的 {ratio} 倍，占用内存 {memory} GB；PEFT 占用 {peft_memory} GB",
        "machine": "每秒训练的 token 数。{cores} 个 CPU 核，fp32，torch {torch}；各运行 {pairs} 次，取中位数。",
        "before": "训练前",
        "after": "训练后",
    },
}
CASES = ("drop", "nodrop", "gpt2")
"""The cases of the benchmark that the home page shows."""
CHINESE_TITLES = {
    "SmolLM2-135M, LoRA r=16, dropout 0.05": "SmolLM2-135M，LoRA r=16，dropout 0.05",
    "the same without dropout": "同上，不用 dropout",
    "GPT-2 small, r=8 on c_attn, dropout 0.1, batch 16": "GPT-2 small，c_attn 上 r=8，dropout 0.1，批大小 16",
}
ANSWERS = 3
"""How many answers the home page shows."""


def speed(language: str) -> str:
    """Bars of tokens per second, veneer's and PEFT's, for each case of the training benchmark."""
    found = json.loads(SPEED.read_text(encoding="utf-8"))
    cases = [found["cases"][name] for name in CASES]
    fastest = max(pace["median"] for case in cases for pace in case["tokens_per_second"])
    machine = WORDS[language]["machine"].format(
        cores=found["machine"]["cores"], torch=found["machine"]["torch"].partition("+")[0], pairs=found["pairs"]
    )
    figures = "".join(_case(case, fastest, language) for case in cases)
    return f'<div class="speed">\n{figures}<p class="note">{machine}</p>\n</div>'


def _case(case: dict[str, Any], fastest: float, language: str) -> str:
    words = WORDS[language]
    title = case["title"] if language == "en" else CHINESE_TITLES.get(case["title"], case["title"])
    veneer, peft = (pace["median"] for pace in case["tokens_per_second"])
    memory, peft_memory = (size / 1e9 for size in case["peak_bytes"])
    ratio = f"{case['speed']['median']:.1f}"
    gain = words["gain"].format(ratio=ratio, memory=f"{memory:.1f}", peft_memory=f"{peft_memory:.1f}")
    bars = _bar("veneer", veneer, fastest) + _bar("PEFT", peft, fastest)
    return f"<figure><figcaption>{escape(title)}</figcaption>\n{bars}<p>{gain}</p></figure>\n"


def _bar(label: str, pace: float, fastest: float) -> str:
    style = f"width:{80 * pace / fastest:.1f}%"
    return (
        f'<div class="bar"><span>{label}</span><i class="{label.lower()}" style="{style}"></i><b>{pace:.0f}</b></div>\n'
    )


def answers(language: str) -> str:
    """What the base model and a trained adapter say to held-out prompts."""
    words = WORDS[language]
    samples = json.loads(DEMO.read_text(encoding="utf-8"))["samples"][:ANSWERS]
    parts = []
    for sample in samples:
        before = escape(_shortened(sample["before"]))
        after = escape(_shortened(sample["after"]))
        parts.append(
            f'<div class="exchange"><p class="prompt">{escape(sample["prompt"])}</p>\n'
            f"<div><small>{words['before']}</small><p>{before}</p></div>\n"
            f"<div><small>{words['after']}</small><p><code>{after}</code></p></div></div>"
        )
    return "\n".join(['<div class="exchanges">', *parts, "</div>"])


def _shortened(text: str, most: int = 110) -> str:
    words = " ".join(text.split())
    if len(words) <= most:
        return words
    return words[:most].rpartition(" ")[0] + " …"


def count(language: str) -> str:
    """The number of methods."""
    return str(len(all_methods()))


PARTS = {"speed": speed, "answers": answers, "count": count}
"""What the comments `<!-- part: NAME -->` of a page become."""
