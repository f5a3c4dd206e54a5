"""What the benchmarks share: the real model, real rows, training steps, and this process's memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import veneer

MODEL = "smollm2-135m-instruct"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Tokenised rows of question and answer: ids, and how many of them belong to the question."""

    ids: tuple[tuple[int, ...], ...]
    prompts: tuple[int, ...]

    def batch(self, which: Sequence[int], pad: int) -> Batch:
        """Some rows padded on the right; the loss falls on the answers."""
        rows = [torch.tensor(self.ids[i]) for i in which]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        place = torch.arange(padded.shape[1])
        lengths = torch.tensor([len(self.ids[i]) for i in which])[:, None]
        mask = (place < lengths).long()
        answer = mask.bool() & (place >= torch.tensor([self.prompts[i] for i in which])[:, None])
        return {"input_ids": padded, "attention_mask": mask, "labels": torch.where(answer, padded, -100)}


def read_rows(path: Path, tokenizer: Any, count: int, longest: int) -> Rows:
    """The first `count` rows of a JSONL file of `question` and `answer` with at most `longest` tokens.

    Without a system prompt, which would be a quarter of a short row.
    """
    found: list[tuple[int, ...]] = []
    prompts: list[int] = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        chat = [{"role": "system", "content": ""}, {"role": "user", "content": row["question"]}]
        head = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        head = tokenizer(head, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(head) + len(answer) <= longest:
            found.append((*head, *answer))
            prompts.append(len(head))
        if len(found) == count:
            break
    if len(found) < count:
        raise SystemExit(f"{path} has {len(found)} rows of at most {longest} tokens; {count} are needed")
    return Rows(tuple(found), tuple(prompts))


def load_base() -> tuple[Any, Any]:
    """The model, frozen, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = veneer.pull(MODEL)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def steps(model: Any, batches: Iterator[Batch], rate: float, count: int, after: Callable[[int], Any]) -> list[float]:
    """Train for `count` steps of AdamW, a tenth of them warm-up, then falling to zero; seconds of each step."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    warm = max(1, count // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, (count - n) / (count - warm + 1))
    )
    seconds = []
    for number in range(1, count + 1):
        start = time.perf_counter()
        model(**next(batches)).loss.backward()
        optimizer.step()
        after(number)
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """The loss per supervised token."""
    total = count = 0.0
    for batch in batches:
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * supervised
        count += supervised
    return total / count


def peak_bytes() -> int:
    """The most memory this process has held."""
    from veneer.train.meter import peak_rss

    return peak_rss()
