"""A few rows asked of the model: what it answers with the adapter, and what the base answers."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ..data.collate import Collator
from ..data.encode import IGNORED, Encoded
from ..data.prepare import Data
from ..model.peft_model import PeftModel

MOST_TOKENS = 256
"""Of a generated answer."""
COMPARED = 200
"""Rows whose prompts are compared to find the chat template around them."""


def samples(model: PeftModel, tokenizer: Any, data: Data, count: int, pad: int) -> dict[str, Any]:
    """Answers to the first held-out rows; where nothing was held out, to rows of the training data.

    Returns:
        held_out, and rows of prompt, expected, after, and (but for classes) before.
    """
    rows = _rows(data)
    chosen = rows[:count]
    if not chosen:
        return {"held_out": data.evaluation is not None, "rows": []}
    if data.labels is not None:
        answers = _classified(model, tokenizer, chosen, data.labels, pad)
    else:
        start, end = _frame([_split(row)[0] for row in rows[:COMPARED]], tokenizer.added_tokens_decoder)
        answers = _generated(model, tokenizer, chosen, pad)
        for row, answer in zip(chosen, answers, strict=True):
            prompt = _split(row)[0]
            answer["prompt"] = _text(tokenizer, prompt[start : len(prompt) - end])
    return {"held_out": data.evaluation is not None, "rows": answers}


def probe(data: Data, pad: int, most: int = 64) -> dict[str, Tensor]:
    """Arguments of a model call for `veneer.model.verify.record`: the start of two rows."""
    rows = [{name: value[:most] if isinstance(value, list) else value for name, value in row.items()}
            for row in _rows(data)[:2]]  # fmt: skip
    return {name: t for name, t in Collator(pad)(rows).items() if name != "labels"}


def _rows(data: Data) -> list[Encoded]:
    """Held-out rows, or those of training, packed ones cut to the first of each pack."""
    if data.evaluation is not None:
        return data.evaluation
    first: list[Encoded] = [row for row, _ in zip(data.train, range(COMPARED), strict=False)]
    return [_unpacked(row) for row in first]


def _unpacked(row: Encoded) -> Encoded:
    places = row.get("position_ids")
    if places is None:
        return dict(row)
    end = next((i for i, place in enumerate(places) if i and place == 0), len(places))
    return {name: value[:end] for name, value in row.items() if name != "position_ids"}


def _split(row: Encoded) -> tuple[list[int], list[int]]:
    """(prompt, the answer expected) of a row; of a text without a prompt, its first half and its second."""
    ids, labels = row["input_ids"], row["labels"]
    end = next((i + 1 for i in reversed(range(len(ids))) if labels[i] != IGNORED), len(ids))
    answer = sum(1 for _ in takewhile(lambda label: label != IGNORED, reversed(labels[:end])))
    start = end - answer or end // 2
    return list(ids[:start]), list(ids[start:end])


def _frame(prompts: Sequence[list[int]], marks: Container[int]) -> tuple[int, int]:
    """How many tokens at the start and at the end all prompts have in common; at the end from the first of `marks` on.

    What all of them end in before that, as questions do in "?", is theirs and not the template's.
    """
    if len(prompts) < 2:
        return 0, 0
    shortest = min(map(len, prompts))
    start = next((i for i in range(shortest) if len({p[i] for p in prompts}) > 1), shortest)
    end = next((i for i in range(shortest - start) if len({p[-1 - i] for p in prompts}) > 1), shortest - start)
    end -= next((i for i, token in enumerate(prompts[0][len(prompts[0]) - end :]) if token in marks), 0)
    return (start, end) if start + end < shortest else (0, 0)


def _generated(model: PeftModel, tokenizer: Any, rows: Sequence[Encoded], pad: int) -> list[dict[str, Any]]:
    pairs = [_split(row) for row in rows]
    most = min(MOST_TOKENS, 8 + max(len(answer) for _, answer in pairs) * 5 // 4)
    batch = _left_padded([prompt for prompt, _ in pairs], pad)
    facts = {k: torch.tensor([row[k] for row in rows]) for k in rows[0].keys() - {"input_ids", "labels"}}
    after = _answers(model, tokenizer, batch | facts, pad, most)
    with model.disable_adapter():
        before = _answers(model, tokenizer, batch | facts, pad, most)
    expected = [_text(tokenizer, answer) for _, answer in pairs]
    return [
        {"prompt": "", "expected": e, "before": b, "after": a} for e, b, a in zip(expected, before, after, strict=True)
    ]


@torch.inference_mode()
def _answers(model: PeftModel, tokenizer: Any, batch: dict[str, Tensor], pad: int, most: int) -> list[str]:
    """Greedy answers; one that had to stop before its end ends in an ellipsis."""
    batch = {name: t.to(model.device) for name, t in batch.items()}
    out = model.generate(**batch, max_new_tokens=most, do_sample=False, pad_token_id=pad)
    new = out[:, batch["input_ids"].shape[1] :].tolist()
    return [
        _text(tokenizer, ids) + (" …" if len(ids) == most and ids[-1] not in _ends(model, pad) else "") for ids in new
    ]


def _ends(model: PeftModel, pad: int) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {pad, *(ends if isinstance(ends, list) else [ends])}


def _left_padded(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) >= longest - lengths[:, None]).long()}


@torch.inference_mode()
def _classified(
    model: PeftModel, tokenizer: Any, rows: Sequence[Encoded], labels: Sequence[str], pad: int
) -> list[dict[str, Any]]:
    batch = {name: t.to(model.device) for name, t in Collator(pad)(rows).items() if name != "labels"}
    shares = model(**batch).logits.float().softmax(-1)
    found = []
    for row, share in zip(rows, shares, strict=True):
        answer = f"{labels[int(share.argmax())]} ({float(share.max()):.0%})"
        found.append({"prompt": _text(tokenizer, row["input_ids"]), "expected": labels[row["labels"]], "after": answer})
    return found


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
