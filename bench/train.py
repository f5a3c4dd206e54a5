"""Training speed and memory: veneer against `peft` and plain `transformers.Trainer`, in alternation.

    python -m bench.train --data train.jsonl                    # all rows of the table, 3 pairs each
    python -m bench.train --data train.jsonl --case nodrop      # one of them
    python -m bench.train --data train.jsonl --steps 2 --pairs 1 --rows 16   # a quick look
    python -m bench.train --data train.jsonl --one nodrop --profile          # where the time of its last step goes

Every run is a process of its own, so that its peak memory is its own; the two libraries take turns. A run trains on the
same batches in the same order from the same start; its speed is real tokens (no padding) over the seconds of its steps
after the first. JSONL rows have `question` and `answer` (GSM8K). Results go to docs/performance-train.json, the table
beside it. On two quiet cores all takes about a quarter of an hour, and 16 GB for PEFT.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .common import Rows, load_base, peak_bytes, read_rows

DOCS = Path(__file__).parent.parent / "docs"
SAME_LOSS, SAME_GRADIENT = 1e-3, 1e-5
"""How near losses (absolute) and the first gradient (relative, of all parameters together) must be to PEFT's."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    title: str
    batch: int
    lora: dict[str, Any]
    wanted: tuple[float, float]
    """Required: times PEFT's speed, and share of its memory."""
    is_gpt2: bool = False
    """Random weights, and all tokens are learned."""
    own_trainer: bool = False
    """The user's own plain Trainer in both: padded batches, and the loss of transformers."""
    moved: bool = False
    """Begin with B off zero, so that every gradient says something."""


ALL_LINEAR = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TUTORIAL = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["c_attn"], "fan_in_fan_out": True}
CASES = {
    "drop": Case("SmolLM2-135M, LoRA r=16, dropout 0.05", 8, ALL_LINEAR | {"lora_dropout": 0.05}, (4.0, 0.33)),
    "nodrop": Case("the same without dropout", 8, ALL_LINEAR, (2.8, 0.42)),
    "own": Case("that under one's own plain Trainer", 8, ALL_LINEAR, (1.4, 0.6), own_trainer=True),
    "gpt2": Case("GPT-2 small, r=8 on c_attn, dropout 0.1, batch 16", 16, TUTORIAL, (3.0, 0.35), is_gpt2=True),
    "agree": Case("20 steps of two rows", 2, ALL_LINEAR, (0.0, 0.0), moved=True),
}
FAMILIES = {"drop": ("drop",), "nodrop": ("nodrop", "own"), "gpt2": ("gpt2",)}
"""Cases by the one that PEFT runs for all of them."""


@dataclass
class Run:
    """What one process measured."""

    tokens_per_second: float
    peak_bytes: int
    losses: list[float]
    seconds: list[float]


# One run


def measure(
    case: Case, library: str, data: Path, steps: int, rows: int, keep: Path | None, profiled: bool = False
) -> dict[str, Any]:
    """Train one way; what it cost, and what came out. The first step's gradients go to the file `keep`."""
    torch.manual_seed(0)
    base, tokenizer = gpt2() if case.is_gpt2 else load_base()
    found = read_rows(data, tokenizer, rows, 1024)
    if library == "veneer" and not case.own_trainer:
        from veneer.ops.allocator import keep_blocks

        keep_blocks()
    lora = case.lora | ({} if case.is_gpt2 or "lora_dropout" in case.lora else {"lora_dropout": 0.0})
    model = adapted(base, library, lora, case.moved)
    clock = Clock(keep)
    trainer = trainer_of(case, library, model, found, tokenizer, steps, clock)
    if profiled:
        trainer.add_callback(profiler(steps))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    real = [sum(len(found.ids[i]) for i in which) for which in batches(case, rows, steps)]
    timed = sum(real[1:]) / sum(clock.seconds[1:]) if steps > 1 else real[0] / clock.seconds[0]
    return vars(Run(timed, peak_bytes(), losses, clock.seconds))


def profiler(steps: int) -> Any:
    """A callback that prints which operations the last of so many steps spends its time in."""
    from transformers import TrainerCallback

    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    class Callback(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == steps - 1:
                profile.__enter__()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            profile.__exit__(None, None, None)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))

    return Callback()


def gpt2() -> tuple[Any, Any]:
    """GPT-2 small's architecture with random weights; SmolLM2's tokenizer, whose vocabulary is of the same size."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    import veneer

    return GPT2LMHeadModel(GPT2Config()), AutoTokenizer.from_pretrained(veneer.pull("smollm2-135m-instruct"))


def adapted(base: Any, library: str, lora: dict[str, Any], moved: bool) -> Any:
    """The model with LoRA, from the same start in both libraries."""
    if library == "peft":
        import peft as lib
    else:
        import veneer as lib  # type: ignore[no-redef]
    model = lib.get_peft_model(base, lib.LoraConfig(task_type="CAUSAL_LM", **lora))
    start(model, moved)
    return model.train()


def start(model: Any, moved: bool) -> None:
    """Give LoRA's factors values that depend only on their names; B stays zero unless `moved`."""
    for name, p in sorted((key(n), p) for n, p in model.named_parameters() if p.requires_grad):
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if "lora_A" in name or moved:
            torch.nn.init.uniform_(p, -(bound := p.shape[1] ** -0.5), bound, generator=draw)


def key(name: str) -> str:
    """The same name for a parameter in both libraries."""
    return name.replace(".adapters.default.", ".").replace(".default.", ".")


def batches(case: Case, rows: int, steps: int) -> list[list[int]]:
    """Which rows each step learns."""
    return [[(step * case.batch + i) % rows for i in range(case.batch)] for step in range(steps)]


class Clock:
    """Seconds of each step, and the first step's gradients."""

    def __init__(self, keep: Path | None) -> None:
        self.seconds: list[float] = []
        self.keep, self.begun = keep, 0.0

    def callback(self) -> Any:
        from safetensors.torch import save_file
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.begun = time.perf_counter()

            def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
                if clock.keep is not None and not clock.seconds:
                    named = {key(n): p.grad.contiguous() for n, p in model.named_parameters() if p.requires_grad}
                    save_file(named, clock.keep)

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.seconds.append(time.perf_counter() - clock.begun)

        return Callback()


def trainer_of(case: Case, library: str, model: Any, rows: Rows, tokenizer: Any, steps: int, clock: Clock) -> Any:
    """Plain Trainer with padded batches; for veneer, unless it is the user's own, the trainer of `veneer train`."""
    from transformers import Trainer, TrainingArguments

    from veneer.data.collate import Collator

    pad = tokenizer.pad_token_id or 0
    encoded = encode(case, rows)
    chosen = [encoded[i] for which in batches(case, len(rows.ids), steps) for i in which]
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=case.batch,
        max_steps=steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    shared: dict[str, Any] = {"train_dataset": chosen, "data_collator": Collator(pad)}
    kind: Any = Trainer
    if library == "veneer" and not case.own_trainer:
        from veneer.data.packing import goes_by_sequence
        from veneer.train.meter import Meter
        from veneer.train.trainer import ExactTrainer

        kind = ExactTrainer
        flat = Collator(pad, flat=True) if goes_by_sequence(model, chosen) else None
        shared |= {"sampler": None, "meter": Meter(), "flat": flat}
    trainer = kind(model, settings, **shared)
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(chosen)
    trainer.add_callback(clock.callback())
    return trainer


def encode(case: Case, rows: Rows) -> list[dict[str, list[int]]]:
    """Rows with their labels: of the answers, or of everything."""
    found = []
    for ids, prompt in zip(rows.ids, rows.prompts, strict=True):
        hidden = 0 if case.is_gpt2 else prompt
        found.append({"input_ids": list(ids), "labels": [-100] * hidden + list(ids[hidden:])})
    return found


# The machine and its floor


def matrix_rate(seconds: float = 2.0) -> float:
    """FLOP/s of this machine in products of the sizes that training makes; the best of many."""
    a, b = torch.randn(2048, 1536), torch.randn(1536, 1536)
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * a.numel() * b.shape[1] / (time.perf_counter() - start))
    return best


def floor_flops(case: Case, rows: Rows, which: Sequence[Sequence[int]]) -> float:
    """FLOP of these steps at least: 4 for each frozen weight and token, 4 for each of the head's and supervised token,
    12 for each pair of tokens, layer and channel in attention, half of them masked."""
    layers, width, body, head = (12, 768, 85e6, 38.6e6) if case.is_gpt2 else (30, 576, 106.2e6, 28.3e6)
    total = 0.0
    for i in (i for step in which for i in step):
        tokens = len(rows.ids[i])
        supervised = tokens - 1 if case.is_gpt2 else tokens - rows.prompts[i]
        total += 4 * body * tokens + 4 * head * supervised + 12 * layers * width * tokens * tokens / 2
    return total


# All runs


def run(name: str, library: str, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.train", "--one", name, "--library", library, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} under {library} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(case: Case, pairs: Sequence[tuple[Any, Any]], rows: Rows, steps: int) -> dict[str, Any]:
    """Ratios of a case's pairs (veneer, peft), and how near the results are."""
    which = batches(case, len(rows.ids), steps)[1:] or batches(case, len(rows.ids), steps)
    speed = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    memory = [ours["peak_bytes"] / theirs["peak_bytes"] for ours, theirs in pairs]
    rate = matrix_rate()
    real = sum(len(rows.ids[i]) for step in which for i in step)
    share = [floor_flops(case, rows, which) / rate / (real / ours["tokens_per_second"]) for ours, _ in pairs]
    return {
        "title": case.title,
        "wanted": case.wanted,
        "speed": three(speed),
        "memory": three(memory),
        "tokens_per_second": [three([pair[i]["tokens_per_second"] for pair in pairs]) for i in (0, 1)],
        "peak_bytes": [max(pair[i]["peak_bytes"] for pair in pairs) for i in (0, 1)],
        "matrix_gflops": rate / 1e9,
        "share_of_floor": three(share),
        "pairs": [{"veneer": summary(a), "peft": summary(b)} for a, b in pairs],
    }


def three(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(one: dict[str, Any]) -> dict[str, Any]:
    return {name: one[name] for name in ("tokens_per_second", "peak_bytes", "seconds")}


def nearness(ours: Path, theirs: Path) -> tuple[float, float]:
    """Relative difference of two files' tensors: of all together, and of the one where it is largest."""
    from safetensors.torch import load_file

    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys(), "the two train the same parameters"
    pairs = [(float((a[name].double() - b[name]).norm()), float(b[name].double().norm())) for name in b]
    apart, size = (math.hypot(*values) for values in zip(*pairs, strict=True))
    return apart / size, max(d / n for d, n in pairs)


def table(results: dict[str, Any]) -> str:
    head = ["case", "PEFT tokens/s", "veneer tokens/s", "times (min-max)", "required", "memory GB", "share (required)"]
    head += ["of the floor"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in results["cases"].values():
        (ours, theirs), (own_peak, their_peak) = case["tokens_per_second"], case["peak_bytes"]
        speed = case["speed"]
        cells = [
            case["title"],
            f"{theirs['median']:.0f}",
            f"{ours['median']:.0f}",
            f"**{speed['median']:.2f}** ({speed['min']:.2f}-{speed['max']:.2f})",
            f"{case['wanted'][0]:.1f}",
            f"{own_peak / 1e9:.1f} / {their_peak / 1e9:.1f}",
            f"**{case['memory']['median']:.2f}** ({case['wanted'][1]:.2f})",
            f"{case['share_of_floor']['median']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    machine = results["machine"]
    note = f"{machine['cores']} cores, fp32, torch {machine['torch']}, {machine['matrix_gflops']:.0f} GFLOP/s in "
    note += "products"
    note += f"; medians of {results['pairs']} pairs of {results['steps']} steps."
    if "agreement" in results:
        a = results["agreement"]
        note += f" Over 20 steps without dropout the losses differ by at most {a['loss_difference']:.1e}, the first"
        note += (
            f" gradient by {a['gradient_difference']:.1e} of its length ({a['worst_tensor']:.1e} in the worst tensor)."
        )
    return "\n".join(lines) + f"\n\n{note}\n"


def main(
    data: Annotated[Path, typer.Option(help="A JSONL file of question and answer.")],
    case: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(FAMILIES)}.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run; the first is not timed.")] = 2,
    pairs: Annotated[int, typer.Option(help="Runs of each library.")] = 3,
    rows: Annotated[int, typer.Option(help="Rows to draw batches from.")] = 160,
    agree: Annotated[bool, typer.Option(help="Also 20 steps of each without dropout, to compare losses.")] = True,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
    profiled: Annotated[bool, typer.Option("--profile", help="With --one: where the last step's time goes.")] = False,
    one: Annotated[str | None, typer.Option(help="One run of one case, in this process.")] = None,
    library: Annotated[str, typer.Option(hidden=True)] = "veneer",
    keep: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if one:
        print(json.dumps(measure(CASES[one], library, data, steps, rows, keep, profiled)))
        return
    found: dict[str, Any] = {"steps": steps, "pairs": pairs, "machine": machine(), "cases": {}}
    tokens, arguments = read_rows(data, load_base()[1], rows, 1024), ["--data", str(data), "--steps", str(steps)]
    if agree:
        found["agreement"] = agreement(data)
    for family in case or list(FAMILIES):
        measured = [take_turns(family, number, [*arguments, "--rows", str(rows)]) for number in range(pairs)]
        for name in FAMILIES[family]:
            pairs_of = [(turn[name], turn["peft"]) for turn in measured]
            found["cases"][name] = compare(CASES[name], pairs_of, tokens, steps)
        out.mkdir(exist_ok=True)
        (out / "performance-train.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "performance-train.md").write_text(table(found))
    print(table(found))


def take_turns(family: str, number: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Each case of a family, and PEFT: in the other order every second time."""
    runs = [*((name, "veneer") for name in FAMILIES[family]), (family, "peft")]
    turn = {}
    for name, which in runs if number % 2 == 0 else reversed(runs):
        label = "peft" if which == "peft" else name
        turn[label] = run(name, which, arguments)
        speed, peak = turn[label]["tokens_per_second"], turn[label]["peak_bytes"]
        print(f"{name} {which}: {speed:.0f} tokens/s, {peak / 1e9:.1f} GB", flush=True)
    return turn


def agreement(data: Path) -> dict[str, Any]:
    """Twenty steps of two rows: losses within 1e-3, the first gradients within 1e-5 relative.

    Raises:
        SystemExit: they are not.
    """
    with tempfile.TemporaryDirectory() as place:
        files = {which: Path(place) / f"{which}.safetensors" for which in ("veneer", "peft")}
        settings = ["--data", str(data), "--steps", "20", "--rows", "40", "--keep"]
        losses = {which: run("agree", which, [*settings, str(files[which])])["losses"] for which in files}
        gradient, worst = nearness(files["veneer"], files["peft"])
    loss = max(abs(a - b) for a, b in zip(losses["veneer"], losses["peft"], strict=True))
    print(f"over 20 steps losses differ by at most {loss:.1e}, the first gradient by {gradient:.1e}", flush=True)
    if loss > SAME_LOSS or gradient > SAME_GRADIENT:
        raise SystemExit(f"losses must agree within {SAME_LOSS}, the first gradient within {SAME_GRADIENT} (relative)")
    return {"loss_difference": loss, "gradient_difference": gradient, "worst_tensor": worst, "losses": losses}


def machine() -> dict[str, Any]:
    return {"cores": torch.get_num_threads(), "torch": torch.__version__, "matrix_gflops": matrix_rate() / 1e9}


if __name__ == "__main__":
    typer.run(main)
