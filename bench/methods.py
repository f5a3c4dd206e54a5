"""Every method on one small task with nothing but its name: what it learns, what it costs.

    python -m bench.methods --data train.jsonl                         # all methods, veneer and PEFT
    python -m bench.methods ... --only hira --only vera                # some of them, into the same table
    python -m bench.methods ... --no-timing                            # losses alone, on a busy machine

Each method runs in a process of its own: SmolLM2-135M, 60 steps of one short row, the loss on 64 held-out rows, the
same rows, order and seed for all. Step times are taken in alternation with LoRA's in that process. Results go to
docs/methods.json, the table to docs/methods-table.md. JSONL rows have `question` and `answer` (GSM8K).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import veneer
from veneer.model.catalogue import config_for, page, pages

from .common import Batch, Rows, load_base, mean_loss, peak_bytes, read_rows, steps

STEPS, ROWS, HELD_OUT, LONGEST = 60, 1, 64, 104
DOCS = Path(__file__).parent.parent / "docs"
TIMED = 5
"""Steps of the method and of LoRA that are timed in turn."""


@dataclass
class Task:
    """The model, the rows to learn and the rows to judge by."""

    tokenizer: Any
    learn: Rows
    judge: list[Batch]
    facts: tuple[str, ...] = ()

    def batches(self, seed: int = 0) -> Iterator[Batch]:
        order = list(range(len(self.learn.ids)))
        random.Random(seed).shuffle(order)
        for i in itertools.count(0, ROWS):
            yield self.call(self.learn.batch([order[(i + j) % len(order)] for j in range(ROWS)], 0))

    def call(self, batch: Batch) -> Batch:
        """With what belongs to the adapter: one task for all rows."""
        return batch | ({"task_ids": torch.zeros(len(batch["labels"]), dtype=torch.long)} if self.facts else {})


def load(data: Path) -> tuple[Any, Task]:
    """The first short rows are held out, the next ones are learned, each once."""
    base, tokenizer = load_base()
    rows = read_rows(data, tokenizer, HELD_OUT + STEPS * ROWS, LONGEST)
    held = sorted(range(HELD_OUT), key=lambda i: len(rows.ids[i]))
    learn = Rows(rows.ids[HELD_OUT:], rows.prompts[HELD_OUT:])
    return base, Task(tokenizer, learn, [rows.batch(held[i : i + 8], 0) for i in range(0, HELD_OUT, 8)])


# One method in one library


def measure(
    name: str, library: str, data: Path, rate: float | None, settings: dict[str, Any], timing: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    base, task = load(data)
    own = settings_for(name, task, base)
    model = build(name, library, base, own | settings, task)
    task.facts = tuple(f for f in config_for(name, **own).facts if f == "task_ids")
    after = model.base_model.update_and_allocate if library == "peft" and name == "adalora" else bool
    model.train()
    steps(model, task.batches(), rate or page(name).learning_rate, STEPS, after)
    model.eval()
    loss = mean_loss(model, [task.call(batch) for batch in task.judge])
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = peak_bytes()
    return {
        "after": loss,
        "trainable": learned,
        "peak_bytes": peak,
        "file_bytes": size_on_disk(model),
        "step_over_lora": relative_step(model, library, task) if timing else None,
    }


def settings_for(name: str, task: Task, base: Any) -> dict[str, Any]:
    """What a method cannot do without on this task."""
    if name == "adalora":
        return {"total_step": STEPS}
    if name == "alora":
        return {"alora_invocation_tokens": task.tokenizer("<|im_start|>assistant")["input_ids"]}
    if name == "union":
        return {"configs": [config_for("lora"), config_for("seq_bn")]}
    if name in ("average", "split"):
        return {"learned": True, "adapter_names": ["0", "1"]}
    if name == "fusion":
        return {"adapter_names": ["0", "1"]}
    if name == "arrow":
        return {"arrow_config": {"task_adapter_names": experts(task, base), "top_k": 2}}
    if name == "xlora":
        found = {str(i): path for i, path in enumerate(experts(task, base))}
        return {"adapters": found, "hidden_size": base.config.hidden_size}
    return {}


def experts(task: Task, base: Any) -> list[str]:
    """Two LoRA adapters, each trained for a third of the steps on rows of its own."""
    found = []
    for seed in (1, 2):
        model = veneer.get_peft_model(base, veneer.LoraConfig(task_type="CAUSAL_LM"))
        steps(model, task.batches(seed), page("lora").learning_rate, STEPS // 3, bool)
        found.append(tempfile.mkdtemp())
        model.save_pretrained(found[-1])
        base = model.unload()
    return found


def beside_experts(task: Task, base: Any, config: Any) -> Any:
    """A model with an adapter that reads others, which it finds there."""
    first, second = experts(task, base)
    model = veneer.PeftModel.from_pretrained(base, first, "0")
    model.load_adapter(second, "1")
    model.add_adapter("default", config)
    model.set_adapter("default")
    return model


def build(name: str, library: str, base: Any, settings: dict[str, Any], task: Task) -> Any:
    base.requires_grad_(False)
    if library == "veneer":
        config = config_for(name, **settings, task_type="CAUSAL_LM")
        reads = getattr(config, "adapter_names", None)
        return beside_experts(task, base, config) if reads else veneer.get_peft_model(base, config)
    import peft

    base.config.use_cache = name != "xlora"
    found = config_for(name, **settings)
    given = {**found.example, "task_type": "CAUSAL_LM", **settings}
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(str(found.peft_type))]
    return peft.get_peft_model(base, kind(**given))


def size_on_disk(model: Any) -> int:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, selected_adapters=["default"])
        return sum(f.stat().st_size for f in Path(directory).rglob("*.safetensors"))


def relative_step(model: Any, library: str, task: Task) -> float:
    """The median step of this method over LoRA's, in alternation."""
    base, _ = load_base()
    runs = ((model.train(), task), (build("lora", library, base, {}, task).train(), replace(task, facts=())))
    ratios = []
    for seed in range(TIMED + 1):  # the first warms up
        own, loras = (steps(one, its.batches(seed), 1e-6, 1, bool)[0] for one, its in runs)
        ratios.append(own / loras)
    return statistics.median(ratios[1:])


# All of them


def run(name: str, library: str, arguments: list[str]) -> dict[str, Any]:
    """One measurement in a process of its own; an error is a result too."""
    command = [sys.executable, "-m", "bench.methods", *arguments, "--one", name, "--library", library]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [
            line for line in done.stderr.splitlines() if re.match(r"\S*(Error|Exception|Mismatch|Mergeable)\b", line)
        ]
        return {"error": (lines or done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def untrained(data: Path) -> float:
    base, task = load(data)
    return mean_loss(base.eval(), task.judge)


INTRODUCTION = """# Every method on one small task

Each method trains SmolLM2-135M for {steps} steps of one short row of GSM8K, with the same rows and seed, and with the
method's recommended learning rate and settings. The columns:

- **loss** on {held} held-out rows; it was {before:.3f} before training;
- **of LoRA's gain**: the reduction of the loss, relative to that of LoRA;
- **trainable**: the number of trained parameters;
- **step / LoRA**: the time of a step relative to one of LoRA, the median of pairs measured in alternation;
- **peak GB**: the peak memory of the process;
- **file MB**: the size of the adapter file;
- the same for PEFT, for the methods that it has.

`python -m bench.methods` measured {ours} of veneer's methods and {theirs} of PEFT's.{below}

"""


def introduction(results: dict[str, Any]) -> str:
    """What was measured, and which methods did not learn enough."""
    before, done = results["before"], {n: r for n, r in results["veneer"].items() if "after" in r}
    half = (before + done["lora"]["after"]) / 2
    slow = sorted(name for name, result in done.items() if result["after"] > half)
    below = f" These reach less than half of LoRA's gain: {', '.join(slow)}." if slow else ""
    counts = {"ours": len(results["veneer"]), "theirs": len(results["peft"])}
    return INTRODUCTION.format(steps=STEPS, held=HELD_OUT, before=before, below=below, **counts)


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a method, PEFT's beside veneer's."""
    before, lora = results["before"], results["veneer"]["lora"]
    lines = [
        "| method | loss | of LoRA's gain | trainable | step / LoRA | peak GB | file MB | PEFT: loss | step | file |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in sorted(results["veneer"]):
        ours, theirs = results["veneer"][name], results["peft"].get(name)
        cells = [name, *_cells(ours, before, lora), *_pefts(theirs)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(result: dict[str, Any], before: float, lora: dict[str, Any]) -> list[str]:
    if "error" in result:
        return [result["error"].replace("|", "/"), *[""] * 5]
    gain = (before - result["after"]) / (before - lora["after"])
    return [
        f"{result['after']:.3f}",
        f"{gain:.0%}",
        f"{result['trainable']:,}",
        _ratio(result),
        f"{result['peak_bytes'] / 1e9:.1f}",
        f"{result['file_bytes'] / 1e6:.2f}",
    ]


def _pefts(result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return ["-", "-", "-"]
    if "error" in result:
        return [result["error"].split(":")[0][:40], "-", "-"]
    return [f"{result['after']:.3f}", _ratio(result), f"{result['file_bytes'] / 1e6:.2f}"]


def _ratio(result: dict[str, Any]) -> str:
    return "-" if result["step_over_lora"] is None else f"{result['step_over_lora']:.2f}"


def has(library: str, name: str) -> bool:
    import peft

    return library == "veneer" or str(veneer.all_methods()[name].peft_type) == name.upper() in peft.PeftType.__members__


def main(
    data: Annotated[Path, typer.Option(help="JSONL of question and answer.")],
    only: Annotated[list[str] | None, typer.Option(help="Just these methods.")] = None,
    libraries: Annotated[str, typer.Option(help="veneer, peft or both, by a comma.")] = "veneer,peft",
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
    library: Annotated[str, typer.Option(hidden=True)] = "veneer",
    rate: Annotated[float | None, typer.Option(help="Another learning rate.")] = None,
    settings: Annotated[str, typer.Option(help="Settings over the defaults, as JSON.")] = "{}",
    timing: Annotated[bool, typer.Option(help="Also time steps against LoRA's.")] = True,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
) -> None:
    if one:
        print(json.dumps(measure(one, library, data, rate, json.loads(settings), timing)))
        return
    arguments = ["--data", str(data), "--settings", settings]
    arguments += ["--rate", str(rate)] if rate else []
    arguments += [] if timing else ["--no-timing"]
    store = out / "methods.json"
    results = json.loads(store.read_text()) if store.exists() else {"before": untrained(data), "veneer": {}, "peft": {}}
    for name in only or list(pages()):
        for which in libraries.split(","):
            if has(which, name):
                results[which][name] = run(name, which, arguments)
                print(which, name, json.dumps(results[which][name]), flush=True)
                store.parent.mkdir(exist_ok=True)
                store.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    if "lora" in results["veneer"]:
        (out / "methods-table.md").write_text(introduction(results) + table(results))


if __name__ == "__main__":
    typer.run(main)
