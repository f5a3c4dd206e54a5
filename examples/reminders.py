"""Scores of the adapter that `veneer train examples/reminders.yaml` made, on prompts it was not trained on.

`make demo` runs both: it trains a LoRA adapter for about three minutes on a CPU, then loads it from disk onto the base
model, asks base and adapter the same held-out prompts, and counts the right answers.
"""

import json
from pathlib import Path
from textwrap import shorten

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from veneer import AutoPeftModelForCausalLM, pull

HELD_OUT = Path(__file__).parent / "data" / "reminders-heldout.jsonl"
OUTPUT = Path("demo-output")
console = Console()


def main():
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(pull("smollm2-135m-instruct"))
    model = AutoPeftModelForCausalLM.from_pretrained(OUTPUT)
    with model.disable_adapter():
        before = ask(model, tokenizer, rows, "asking the base model")
    after = ask(model, tokenizer, rows, "asking with the adapter")
    console.print(answers_table(rows[:6], before, after))
    console.print(scores_table(rows, before, after))
    console.print(f"the run as a page: {OUTPUT / 'report.html'}")


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


def as_chat(tokenizer, prompt):
    """The prompt in the model's chat template, up to where the assistant's answer begins."""
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


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


if __name__ == "__main__":
    main()
