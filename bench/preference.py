"""Learning from preferences: `veneer train --objective dpo` against TRL's DPOTrainer with peft, in alternation.

    python -m bench.preference --data train.jsonl              # 3 pairs of runs
    python -m bench.preference --data train.jsonl --pairs 1    # a quick look

JSONL rows have `question` and `answer` (GSM8K); the rejected answer of a question is the answer of the next one. Both
libraries get the same tokens in the same order, and LoRA of rank 16 on all linear layers of SmolLM2-135M from the same
start. Every run is a process of its own, so that its peak memory is its own. Speed is real tokens (no padding) over the
seconds of the steps after the first. Results go to docs/performance-preference.json, the table beside it. On two quiet
cores this takes about ten minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .common import Rows, load_base, peak_bytes, read_rows
from .train import ALL_LINEAR, DOCS, SAME_LOSS, Clock, adapted, machine, start, summary, three

LORA = ALL_LINEAR | {"lora_dropout": 0.0}
BATCH = 4
BETA = 0.1
GOAL = (2.5, 0.5)
"""Times TRL's speed, and share of its memory."""


def pairs_of(rows: Rows) -> list[dict[str, Any]]:
    """Rows {chosen, rejected} as `veneer.data.preferences` encodes them."""
    pairs = []
    for i, (ids, prompt) in enumerate(zip(rows.ids, rows.prompts, strict=True)):
        other = (i + 1) % len(rows.ids)
        question = list(ids[:prompt])
        answers = list(ids[prompt:]), list(rows.ids[other][rows.prompts[other] :])
        chosen, rejected = ({"input_ids": question + a, "labels": [-100] * prompt + a} for a in answers)
        pairs.append({"chosen": chosen, "rejected": rejected})
    return pairs


def measure(library: str, data: Path, steps: int) -> dict[str, Any]:
    """Train one way; what it cost, and its losses."""
    torch.manual_seed(0)
    base, tokenizer = load_base()
    pairs = pairs_of(read_rows(data, tokenizer, BATCH * steps, 1024))
    clock = Clock(None)
    build = ours if library == "veneer" else theirs
    trainer = build(base, pairs, tokenizer, steps)
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.add_callback(clock.callback())
    trainer.train()
    tokens = [len(pair[name]["input_ids"]) for pair in pairs for name in ("chosen", "rejected")]
    return {
        "tokens_per_second": sum(tokens[2 * BATCH :]) / sum(clock.seconds[1:]),
        "peak_bytes": peak_bytes(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": clock.seconds,
    }


def settings(steps: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }


def ours(base: Any, pairs: list[dict[str, Any]], tokenizer: Any, steps: int) -> Any:
    """The trainer of `veneer train`."""
    from transformers import TrainingArguments

    from veneer.data.collate import Collator, Rows
    from veneer.ops.allocator import keep_blocks
    from veneer.train.meter import Meter
    from veneer.train.objectives import DPO
    from veneer.train.preference import PairCollator, PreferenceTrainer
    from veneer.train.recipe import make

    keep_blocks()
    pad = tokenizer.pad_token_id or 0
    return PreferenceTrainer(
        adapted(base, "veneer", LORA, moved=True),
        TrainingArguments(**settings(steps)),
        objective=DPO(beta=BETA),
        recipe=make({"model": "-", "data": "-", "output": "-"}),
        train_dataset=Rows(pairs),
        data_collator=PairCollator(Collator(pad)),
        flat=PairCollator(Collator(pad, flat=True), shares=True),
        sampler=None,
        meter=Meter(),
    )


def theirs(base: Any, pairs: list[dict[str, Any]], tokenizer: Any, steps: int) -> Any:
    """TRL's trainer. It is built with a row of text, and then given our tokens."""
    import peft
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(**settings(steps), beta=BETA, bf16=False, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    start(trainer.model, moved=True)
    rows = []
    for pair in pairs:
        prompt = sum(label == -100 for label in pair["chosen"]["labels"])
        row = {"prompt_ids": pair["chosen"]["input_ids"][:prompt]}
        row |= {f"{name}_ids": pair[name]["input_ids"][prompt:] for name in ("chosen", "rejected")}
        rows.append(row)
    trainer.train_dataset = Dataset.from_list(rows)
    return trainer


def run(library: str, data: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.preference", "--data", str(data), "--steps", str(steps), "--one", library]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{library} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{library}: {found['tokens_per_second']:.0f} tokens/s, {found['peak_bytes'] / 1e9:.1f} GB", flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    speed, memory = found["speed"], found["memory"]
    (ours, theirs), (our_peak, their_peak) = found["tokens_per_second"], found["peak_bytes"]
    lines = [
        "| DPO, SmolLM2-135M, LoRA r=16 | TRL + PEFT | veneer | ratio (min-max) | goal |",
        "|---|--:|--:|--:|--:|",
        f"| tokens/s | {theirs['median']:.0f} | {ours['median']:.0f} | **{speed['median']:.2f}** ({speed['min']:.2f}-"
        f"{speed['max']:.2f}) | {GOAL[0]} |",
        f"| peak memory, GB | {their_peak / 1e9:.1f} | {our_peak / 1e9:.1f} | **{memory['median']:.2f}** "
        f"({memory['min']:.2f}-{memory['max']:.2f}) | {GOAL[1]} |",
    ]
    at = found["machine"]
    note = f"{at['cores']} cores, fp32, torch {at['torch']}, {at['matrix_gflops']:.0f} GFLOP/s in products; medians of "
    note += f"{len(found['runs'])} pairs of {found['steps']} steps of {BATCH} pairs. The losses differ by at most "
    return "\n".join(lines) + f"\n\n{note}{found['loss_difference']:.1e}.\n"


def main(
    data: Annotated[Path, typer.Option(help="A JSONL file of question and answer.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run; the first is not timed.")] = 3,
    pairs: Annotated[int, typer.Option(help="Runs of each library.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    if one:
        print(json.dumps(measure(one, data, steps)))
        return
    runs = []
    for number in range(pairs):
        order = ("veneer", "trl") if number % 2 == 0 else ("trl", "veneer")
        turn = {library: run(library, data, steps) for library in order}
        runs.append((turn["veneer"], turn["trl"]))
    difference = max(abs(a - b) for mine, other in runs for a, b in zip(mine["losses"], other["losses"], strict=True))
    if difference > SAME_LOSS:
        raise SystemExit(f"losses differ by {difference:.1e}; they must agree within {SAME_LOSS}")
    found = {
        "steps": steps,
        "machine": machine(),
        "speed": three([a["tokens_per_second"] / b["tokens_per_second"] for a, b in runs]),
        "memory": three([a["peak_bytes"] / b["peak_bytes"] for a, b in runs]),
        "tokens_per_second": [three([turn[i]["tokens_per_second"] for turn in runs]) for i in (0, 1)],
        "peak_bytes": [max(turn[i]["peak_bytes"] for turn in runs) for i in (0, 1)],
        "loss_difference": difference,
        "runs": [{"veneer": summary(a), "trl": summary(b)} for a, b in runs],
    }
    out.mkdir(exist_ok=True)
    (out / "performance-preference.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "performance-preference.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
