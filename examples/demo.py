"""Teach a small chat model a new skill: turn a reminder in everyday language into one line of JSON.

Run it with `make demo`. It asks the model before training, trains a LoRA adapter for about two minutes on a CPU, saves
it, loads it into a fresh copy of the base model, and asks again.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from veneer import LoraConfig, PeftModel, TaskType, get_peft_model
from veneer.pull import resolve

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA = Path(__file__).parent / "data"
OUTPUT = Path("demo-output")
SHOWN = 6
console = Console()


def read_rows(file):
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


def as_chat(tokenizer, prompt):
    """The prompt as the model's chat template puts it, up to where the assistant's answer begins."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )


def encode(tokenizer, row):
    """Token ids of prompt and answer. Label -100 means no loss: the model learns the answer and where it ends."""
    prompt = tokenizer(as_chat(tokenizer, row["prompt"])).input_ids
    answer = tokenizer(row["completion"] + tokenizer.eos_token).input_ids
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


@torch.inference_mode()
def ask(model, tokenizer, rows, title):
    """The model's greedy answers, several prompts at a time."""
    model.eval()
    answers = []
    for start in track(range(0, len(rows), SHOWN), title, console=console):
        chats = [as_chat(tokenizer, row["prompt"]) for row in rows[start : start + SHOWN]]
        batch = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(**batch, max_new_tokens=56, do_sample=False)
        answers += tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def train(model, tokenizer, rows):
    """Train with transformers' own Trainer, and return the loss of each step."""
    arguments = TrainingArguments(
        output_dir=str(OUTPUT),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    examples = [encode(tokenizer, row) for row in rows]
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def is_reminder(answer):
    """True when the answer is one JSON object with exactly the three fields."""
    try:
        return json.loads(answer).keys() == {"task", "when", "note"}
    except (ValueError, AttributeError):
        return False


def show_answers(rows, before, after):
    table = Table(title="Prompts the model was not trained on", show_lines=True)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, ratio=1)
    for row, old, new in list(zip(rows, before, after, strict=True))[:SHOWN]:
        table.add_row(row["prompt"], old, f"[green]{new}" if new == row["completion"] else new)
    console.print(table)


def show_scores(rows, before, after):
    table = Table(title=f"Score on all {len(rows)} held-out prompts")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right")
    valid = [f"{sum(map(is_reminder, answers)) / len(rows):.0%}" for answers in (before, after)]
    exact = [
        f"{sum(answer == row['completion'] for answer, row in zip(answers, rows, strict=True)) / len(rows):.0%}"
        for answers in (before, after)
    ]
    table.add_row("valid JSON with the three fields", *valid)
    table.add_row("exactly the expected answer", *exact)
    console.print(table)


def plot(losses, file):
    smooth, running = [], losses[0]
    for loss in losses:
        running = 0.85 * running + 0.15 * loss
        smooth.append(running)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, color="tab:blue", alpha=0.3, label="each step")
    axes.plot(smooth, color="tab:blue", linewidth=2, label="smoothed")
    axes.set(title="Learning to file reminders", xlabel="step", ylabel="loss on the answer", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main():
    set_seed(0)
    path = resolve("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)
    rows, held_out = read_rows("reminders-train.jsonl"), read_rows("reminders-heldout.jsonl")
    before = ask(base, tokenizer, held_out, "asking the base model")

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    losses = train(model, tokenizer, rows)
    adapter = OUTPUT / "adapter"
    model.save_pretrained(adapter)
    plot(losses, OUTPUT / "loss.png")

    fresh = AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(fresh, adapter)
    after = ask(model, tokenizer, held_out, "asking with the adapter")
    show_answers(held_out, before, after)
    show_scores(held_out, before, after)


if __name__ == "__main__":
    main()
