"""Teach a small chat model a new skill: turn a reminder in everyday language into one line of JSON.

Run it with `make demo`. It asks the model before training, trains a LoRA adapter for about three minutes on a CPU,
saves it, loads it into a fresh copy of the base model, and asks again.
"""

import json
from pathlib import Path
from textwrap import shorten

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from veneer import LoraConfig, PeftModel, TaskType, get_peft_model, pull

MODEL = "smollm2-135m-instruct"
DATA = Path(__file__).parent / "data"
OUTPUT = Path("demo-output")
console = Console()


def main():
    set_seed(0)
    path = pull(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows, held_out = read_rows("reminders-train.jsonl"), read_rows("reminders-heldout.jsonl")

    base = AutoModelForCausalLM.from_pretrained(path)
    before = ask(base, tokenizer, held_out, "asking the base model")

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    losses = train(model, tokenizer, rows)
    model.save_pretrained(OUTPUT / "adapter")
    plot(losses, OUTPUT / "loss.png")

    fresh = AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(fresh, OUTPUT / "adapter")
    after = ask(model, tokenizer, held_out, "asking with the adapter")

    console.print(answers_table(held_out[:6], before, after))
    console.print(scores_table(held_out, before, after))
    say_where_it_is()


def read_rows(file):
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


def as_chat(tokenizer, prompt):
    """The prompt in the model's chat template, up to where the assistant's answer begins."""
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def encode(tokenizer, row):
    """Token ids and labels. Label -100 means no loss: only the answer is learned, and that it ends there."""
    prompt = tokenizer(as_chat(tokenizer, row["prompt"])).input_ids
    answer = tokenizer(row["completion"] + tokenizer.eos_token).input_ids
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


@torch.inference_mode()
def ask(model, tokenizer, rows, title):
    """The model's greedy answers, six prompts at a time."""
    model.eval()
    answers = []
    for start in tqdm(range(0, len(rows), 6), title):
        chats = [as_chat(tokenizer, row["prompt"]) for row in rows[start : start + 6]]
        batch = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(**batch, max_new_tokens=56, do_sample=False)
        answers += tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, instead of one more line for each step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def train(model, tokenizer, rows):
    """Train with transformers' own Trainer, and return the loss of each step."""
    arguments = TrainingArguments(
        output_dir=str(OUTPUT),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    examples = [encode(tokenizer, row) for row in rows]
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    result = trainer.train()
    console.print(f"trained on {len(rows)} examples, {result.metrics['train_runtime']:.0f} seconds")
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def plot(losses, file):
    """The loss of each step, and the mean of the last ten."""
    smooth = [sum(last) / len(last) for last in (losses[max(0, i - 9) : i + 1] for i in range(len(losses)))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="tab:blue", alpha=0.3, label="each step")
    axes.plot(smooth, color="tab:blue", linewidth=2, label="mean of the last 10")
    axes.set(title="Learning to file reminders", xlabel="training step", ylabel="loss on the answer", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def answers_table(rows, before, after):
    table = Table(title="Prompts the model was not trained on", show_lines=True)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    for row, old, new in zip(rows, before, after, strict=False):
        style = "green" if new == row["completion"] else "yellow"
        table.add_row(Text(row["prompt"]), Text(shorten(old, 140, placeholder=" ...")), Text(new, style))
    return table


def scores_table(rows, before, after):
    table = Table("", "before", "after", title=f"Score on all {len(rows)} of them")
    expected = [row["completion"] for row in rows]
    valid = [share(map(is_reminder, answers)) for answers in (before, after)]
    exact = [share(a == e for a, e in zip(answers, expected, strict=True)) for answers in (before, after)]
    table.add_row("valid JSON with the three fields", *valid)
    table.add_row("exactly the expected answer", *exact)
    return table


def share(claims):
    claims = list(claims)
    return f"{sum(claims) / len(claims):.0%}"


def is_reminder(answer):
    """True when the answer is one JSON object with exactly the three fields."""
    try:
        return json.loads(answer).keys() == {"task", "when", "note"}
    except (ValueError, AttributeError):
        return False


def say_where_it_is():
    adapter = OUTPUT / "adapter"
    size = sum(file.stat().st_size for file in adapter.iterdir()) / 1e6
    console.print(f"adapter     {adapter} ({size:.1f} MB)\nloss curve  {OUTPUT / 'loss.png'}\nload it with\n")
    print("    from veneer import AutoPeftModelForCausalLM")
    print(f"    model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})\n")


if __name__ == "__main__":
    main()
