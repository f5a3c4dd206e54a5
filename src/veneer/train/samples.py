"""Sample answers for the report: those of the model with the adapter, and those of the base model."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from itertools import islice
from typing import Any, NamedTuple

import regex
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..data.collate import Collator
from ..data.encode import IGNORED, Encoded
from ..data.preferences import plain
from ..data.prepare import Data
from ..inference.evaluation import same
from ..model.peft_model import PeftModel
from ..terminal import Step
from ..upstream.models import positions_of
from .recipe import Recipe

MOST_TOKENS = 256
"""Maximum length of a generated answer."""
COMPARED = 200
"""Number of rows whose prompts are compared to find the text that the chat template adds around them."""
CUT = " …"
"""The end of a text that was cut."""
CHARACTER = r"\X"
"""A character as a reader sees it (a grapheme): one or several code points."""
WORD = r"\s*\S+"
HALF = "\ufffd\u200d"
"""What the text of tokens that were cut inside a character ends in: bytes that are no character yet, or a joiner."""


class Split(NamedTuple):
    """A row's tokens, split into prompt and expected answer."""

    prompt: list[int]
    answer: list[int]
    asks: bool = True
    """Whether the data has a prompt; without one, the answer is the second half of a text."""


def samples(
    model: PeftModel,
    tokenizer: Any,
    data: Data,
    recipe: Recipe,
    pad: int,
    progress: Step = lambda what, done, of: None,
) -> dict[str, Any]:
    """Answers to the first held-out rows, or to training rows if none were held out.

    Returns:
        held_out; rows of prompt, expected, after and right, and (except for classes) before and right_before;
        exact_match and exact_match_before, the shares of rows that are right. A text that was cut ends in CUT. The
        continuation of a plain text is neither right nor wrong, nor is an answer where one of two is to be preferred:
        None.
    """
    rows = _rows(data)
    chosen = rows[: recipe.samples]
    longest = _longest_whole(data, recipe.max_length)
    answers: list[dict[str, Any]] = []
    if chosen and data.labels is not None:
        answers = _classified(model, tokenizer, chosen, data.labels, pad, longest)
    elif chosen:
        prompts = [_split(tokenizer, row).prompt for row in rows[:COMPARED]]
        start = end = 0
        if _split(tokenizer, rows[0]).asks:
            start, end = _template_lengths(prompts, tokenizer.added_tokens_decoder)
        answers = _generated(model, tokenizer, chosen, pad, longest, progress)
        if recipe.reads_pairs:
            answers = [answer | {"right": None, "right_before": None} for answer in answers]
        for row, answer in zip(chosen, answers, strict=True):
            prompt = _split(tokenizer, row).prompt
            answer["prompt"] = _between(tokenizer, prompt, start, len(prompt) - end)
    return {
        "held_out": data.evaluation is not None,
        "exact_match": _share_right(answers, "right"),
        "exact_match_before": _share_right(answers, "right_before"),
        "rows": answers,
    }


def _share_right(answers: Sequence[dict[str, Any]], name: str) -> float | None:
    """The share of right answers; None if there are none that can be right."""
    judged = [answer[name] for answer in answers if answer.get(name) is not None]
    return sum(judged) / len(judged) if judged else None


def _longest_whole(data: Data, max_length: int) -> float:
    """The length from which on a row may have been cut; infinite if no row was cut."""
    account = data.eval_account or data.account
    return max_length if account.cut_rows else math.inf


def probe(data: Data, pad: int, most: int = 64) -> dict[str, Tensor]:
    """Arguments of a model call for `veneer.model.verify.record`: the first tokens of two rows."""
    rows: list[Encoded] = []
    for row in _rows(data)[:2]:
        rows.append({name: value[:most] if isinstance(value, list) else value for name, value in row.items()})
    batch = Collator(pad)(rows)
    return {name: t for name, t in batch.items() if name != "labels"}


def _rows(data: Data) -> list[Encoded]:
    """The held-out rows, or else the first training rows.

    A packed sequence is represented by its first row, a pair by its chosen answer.
    """
    if data.evaluation is not None:
        return [plain(row) for row in data.evaluation]
    return [_unpacked(plain(row)) for row in islice(data.train, COMPARED)]


def _unpacked(row: Encoded) -> Encoded:
    """The first row of a packed sequence; a copy of any other row."""
    positions = row.get("position_ids")
    if positions is None:
        return dict(row)
    end = len(positions)
    if 0 in positions[1:]:
        end = positions.index(0, 1)
    return {name: value[:end] for name, value in row.items() if name != "position_ids"}


def _split(tokenizer: Any, row: Encoded) -> Split:
    """The prompt and the last learned answer of a row; the two halves of a text without a prompt."""
    ids = row["input_ids"]
    labels = row["labels"]
    end = len(ids)
    while end > 0 and labels[end - 1] == IGNORED:
        end -= 1
    if end == 0:  # no token is learned
        end = len(ids)
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    asks = start > 0
    if not asks:
        start = _cut_between(tokenizer, ids[:end], end // 2, -1, WORD)
        start = start or _cut_between(tokenizer, ids[:end], end // 2, -1, CHARACTER) or end // 2
    return Split(list(ids[:start]), list(ids[start:end]), asks)


def _cut_between(tokenizer: Any, ids: Sequence[int], position: int, step: int, unit: str) -> int:
    """The nearest position that is not inside a unit of the text, in the direction of `step`; 0 and the end are such.

    A token can be a part of a character: tokenizers of bytes split letters of most scripts, and emoji.
    """
    whole = tokenizer.decode(ids)
    ends = {match.end() for match in regex.finditer(unit, whole)}
    while 0 < position < len(ids):
        text = tokenizer.decode(ids[:position])
        if whole.startswith(text) and len(text) in ends and not text.endswith(HALF[0]):
            break
        position += step
    return position


def _between(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The text of the tokens from start to end, with whole characters at both ends."""
    start = _cut_between(tokenizer, ids, start, -1, CHARACTER)
    end = _cut_between(tokenizer, ids, end, 1, CHARACTER)
    return _text(tokenizer, ids[start:end])


def _template_lengths(prompts: Sequence[list[int]], special_tokens: Container[int]) -> tuple[int, int]:
    """Lengths of the chat template before and after the text of the prompts, from the tokens that all prompts share.

    The part after the text begins with a special token; shared tokens before it, such as a final "?", are text.
    """
    if len(prompts) < 2:
        return 0, 0
    shortest = min(len(prompt) for prompt in prompts)
    start = _shared_length(prompts, shortest)
    end = _shared_length([prompt[::-1] for prompt in prompts], shortest - start)
    first = prompts[0]
    for position in range(len(first) - end, len(first)):
        if first[position] in special_tokens:
            end = len(first) - position
            break
    if start + end >= shortest:
        return 0, 0
    return start, end


def _shared_length(prompts: Sequence[list[int]], most: int) -> int:
    """How many of the first `most` tokens all prompts share."""
    for i in range(most):
        if len({prompt[i] for prompt in prompts}) > 1:
            return i
    return most


def _room(model: PeftModel, prompt: int) -> int:
    """How many tokens the model can write after a prompt of so many, within its positions; at least 1."""
    positions = positions_of(model.config)
    if positions is None:
        return MOST_TOKENS
    prompts: Any = model._state.prompts
    learned = sum(prompt.n for prompt in prompts.values())
    return max(1, positions - prompt - learned)


def _generated(
    model: PeftModel, tokenizer: Any, rows: Sequence[Encoded], pad: int, longest_whole: float, progress: Step
) -> list[dict[str, Any]]:
    """Expected and generated answers, with the adapter (after) and without (before)."""
    splits = [_split(tokenizer, row) for row in rows]
    longest = max(len(split.answer) for split in splits)
    longest_prompt = max(len(split.prompt) for split in splits)
    most = min(MOST_TOKENS, 8 + longest * 5 // 4, _room(model, longest_prompt))
    batch = _left_padded([split.prompt for split in splits], pad)
    for name in rows[0].keys() - {"input_ids", "labels"}:
        batch[name] = torch.tensor([row[name] for row in rows])
    after = _answers(model, tokenizer, batch, pad, most, _Counted("sampling the adapter", most, progress))
    with model.disable_adapter():
        before = _answers(model, tokenizer, batch, pad, most, _Counted("sampling the base model", most, progress))
    ends = _end_tokens(model, pad)
    answers = []
    for row, split, text_before, text_after in zip(rows, splits, before, after, strict=True):
        may_be_cut = len(row["input_ids"]) >= longest_whole
        expected = _text(tokenizer, split.answer)
        if may_be_cut and split.answer[-1] not in ends:
            expected = _cut(expected)
        answer: dict[str, Any] = {"prompt": "", "expected": expected, "before": text_before, "after": text_after}
        for name, text in (("right", text_after), ("right_before", text_before)):
            answer[name] = same(text, expected) if split.asks else None
        answers.append(answer)
    return answers


class _Counted(BaseStreamer):
    """Shows how many tokens of a batch of answers are written."""

    def __init__(self, what: str, most: int, progress: Step) -> None:
        self.what = what
        self.most = most
        self.progress = progress
        self.count = -1  # the first call brings the prompts

    def put(self, value: Tensor) -> None:
        self.count += 1
        self.progress(self.what, self.count, self.most)

    def end(self) -> None:
        self.progress(self.what, self.most, self.most)


@torch.inference_mode()
def _answers(
    model: PeftModel, tokenizer: Any, batch: dict[str, Tensor], pad: int, most: int, counted: BaseStreamer
) -> list[str]:
    """Answers by greedy decoding. An answer that was cut at `most` tokens ends in an ellipsis."""
    batch = {name: t.to(model.device) for name, t in batch.items()}
    tokens = model.generate(**batch, max_new_tokens=most, do_sample=False, pad_token_id=pad, streamer=counted)
    prompt_length = batch["input_ids"].shape[1]
    end_tokens = _end_tokens(model, pad)
    texts = []
    for answer in tokens[:, prompt_length:].tolist():
        is_cut = len(answer) == most and answer[-1] not in end_tokens
        text = _text(tokenizer, answer)
        texts.append(_cut(text) if is_cut else text)
    return texts


def _end_tokens(model: PeftModel, pad: int) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {pad, *(ends if isinstance(ends, list) else [ends])}


def _left_padded(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = []
    mask = []
    for prompt in prompts:
        padding = longest - len(prompt)
        ids.append([pad] * padding + prompt)
        mask.append([0] * padding + [1] * len(prompt))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.inference_mode()
def _classified(
    model: PeftModel, tokenizer: Any, rows: Sequence[Encoded], labels: Sequence[str], pad: int, longest_whole: float
) -> list[dict[str, Any]]:
    """Expected and predicted classes, with the probability of the predicted one."""
    inputs = {name: t.to(model.device) for name, t in Collator(pad)(rows).items() if name != "labels"}
    probabilities = model(**inputs).logits.float().softmax(-1)
    answers = []
    for row, p in zip(rows, probabilities, strict=True):
        predicted = labels[int(p.argmax())]
        expected = labels[row["labels"]]
        prompt = _text(tokenizer, row["input_ids"])
        if len(row["input_ids"]) >= longest_whole:
            prompt = _cut(prompt)
        after = f"{predicted} ({float(p.max()):.0%})"
        answers.append({"prompt": prompt, "expected": expected, "after": after, "right": predicted == expected})
    return answers


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _cut(text: str) -> str:
    """A text that was cut between two tokens: without the part of a character at its end, and with a sign."""
    return text.rstrip(HALF).rstrip() + CUT
