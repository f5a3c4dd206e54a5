"""Answers of a base model and of adapters on it, each alone or several in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config import TaskType
from ..core.state import BASE as BASE_ROW
from ..data.chat import Template
from ..errors import ConfigError, DataError
from ..model.loading import BASE, Loaded, pad_of

Message = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Choose among so many of the likeliest tokens; 0: among all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that have occurred become less likely."""
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (is_legal, bound) in bounds.items():
            if not is_legal:
                raise ConfigError(f"{name} = {getattr(self, name)} must be {bound}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ConfigError("top_p and top_k choose among tokens at random, which temperature = 0 does not")


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    ended: bool
    """The model came to its end; False: it was stopped before."""


class Writer:
    """Writes answers.

    Args:
        template_file: a chat template to use in place of the tokenizer's.
        raw: prompts go in as they stand, without a chat template.

    Raises:
        ConfigError: the model is a classifier.
    """

    def __init__(
        self, loaded: Loaded, sampling: Sampling, *, template_file: str | Path | None = None, raw: bool = False
    ) -> None:
        if loaded.task is not TaskType.CAUSAL_LM:
            raise ConfigError(f"{', '.join(loaded.adapters)}: an adapter for {loaded.task.value} writes no text")
        own = Path(template_file).read_text(encoding="utf-8") if template_file else loaded.tokenizer.chat_template
        self.loaded, self.sampling, self.tokenizer = loaded, sampling, loaded.tokenizer
        self.template = Template(loaded.tokenizer, own) if own and not raw else None
        self.pad = pad_of(loaded.tokenizer)
        self.stops = self._stops()

    def tokens(self, messages: Sequence[Message], place: str = "the prompt") -> list[int]:
        """What the model is given: the conversation in its chat template, or a lone text as it stands.

        Raises:
            DataError: there is nothing in it, or the template refuses it.
        """
        if self.template is not None:
            ids = self.tokenizer(self.template.prompt(place, messages), add_special_tokens=False).input_ids
        elif [m["role"] for m in messages] == ["user"]:
            ids = self.tokenizer(messages[0]["content"]).input_ids
        else:
            raise ConfigError(f"{place} is a conversation, and the model has no chat template; give chat_template")
        if not ids:
            raise DataError(f"{place} is empty")
        return list(ids)

    def together(self, names: Sequence[str]) -> list[list[str]]:
        """The names in groups that may share a batch.

        A learned prompt lengthens every row, so it gets a batch of its own; and where tokens are drawn at random,
        rows of one batch would change each other's draws.
        """
        if self.sampling.temperature > 0:
            return [[name] for name in names]
        prompts = self.loaded.model._state.prompts if self.loaded.adapters else ()
        mixed = [name for name in names if name not in prompts]
        return [group for group in (mixed, *([name] for name in names if name in prompts)) if group]

    def write(
        self,
        names: Sequence[str],
        prompts: Sequence[Sequence[int]],
        *,
        facts: Mapping[str, Any] | None = None,
        streamer: Any = None,
        criteria: Any = None,
    ) -> list[Answer]:
        """The answers to a batch of prompts.

        Args:
            names: who answers each row; one for all, or several that go together.
            facts: what the adapters' methods want to know, a value for each row.
            streamer: gets the tokens as they come.
            criteria: further reasons to stop, as `generate` takes them.

        Raises:
            DataError: a prompt and its answer are longer than the model can read.
        """
        self.check_room(max(map(len, prompts)))
        ids, mask = self._padded(prompts)
        same = len(set(names)) == 1
        rows = {} if same else {"adapter_names": [BASE_ROW if name == BASE else name for name in names]}
        torch.manual_seed(self.sampling.seed)
        with self.loaded.running(names[0]) if same else nullcontext():
            found = self.loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._settings(),
                streamer=streamer,
                stopping_criteria=criteria,
                **rows,
                **(facts or {}),
            )
        return [self._answer(row) for row in found[:, ids.shape[1] :].tolist()]

    def check_room(self, length: int, place: str = "the prompt") -> None:
        """Raise unless a prompt of `length` tokens and its answer fit into what the model can read."""
        most = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length + self.sampling.max_new_tokens > most:
            raise DataError(
                f"{place}: {length} tokens of a prompt and {self.sampling.max_new_tokens} new ones are more than the "
                f"{most} that the model can read; shorten it, or lower max_new_tokens"
            )

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(batch, length) ids, filled up on the left, and their mask."""
        longest, device = max(map(len, prompts)), next(self.loaded.model.parameters()).device
        ids = torch.tensor([[*[self.pad] * (longest - len(row)), *row] for row in prompts], device=device)
        lengths = torch.tensor([len(row) for row in prompts], device=device)
        return ids, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()

    def _settings(self) -> Any:
        from transformers import GenerationConfig

        own = self.sampling
        draw = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k} if own.temperature else {}
        return GenerationConfig(
            max_new_tokens=own.max_new_tokens,
            do_sample=own.temperature > 0,
            **draw,
            repetition_penalty=own.repetition_penalty,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=self.pad,
        )

    def _stops(self) -> set[int]:
        """The model's own end tokens, the tokenizer's, and the one that ends an answer in the chat template."""
        own = self.loaded.model.generation_config.eos_token_id
        stop = self.template.stop() if self.template is not None else None
        found = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        found |= {self.tokenizer.convert_tokens_to_ids(stop)} if stop else set()
        return found - {None}

    def _answer(self, tokens: list[int]) -> Answer:
        end = next((i for i, token in enumerate(tokens) if token in self.stops), None)
        own = tokens[:end]
        return Answer(self.tokenizer.decode(own, skip_special_tokens=True), len(own), end is not None)


@dataclass
class Turn:
    question: str
    answers: dict[str, str]
    """By the name of who answered."""

    def said_by(self, name: str) -> str:
        """The answer of one; of another where it was not asked."""
        return self.answers.get(name, next(iter(self.answers.values())))


@dataclass
class Conversation:
    """What was said so far."""

    writer: Writer
    system: str | None = None
    """Instructions before the first question."""
    turns: list[Turn] = field(default_factory=list)

    def messages(self, name: str, question: str) -> list[Message]:
        """What one is asked now, with what went before."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.said_by(name)})
        return [*found, {"role": "user", "content": question}]

    def prompts(self, names: list[str], question: str) -> dict[str, list[int]]:
        """The tokens that each is given.

        Raises:
            DataError: the chat template refuses the conversation, or it has grown too long.
        """
        found = {name: self.writer.tokens(self.messages(name, question), "the conversation") for name in names}
        self.writer.check_room(max(map(len, found.values())), "the conversation")
        return found

    def add(self, question: str, answers: dict[str, str]) -> None:
        self.turns.append(Turn(question, answers))

    def reset(self) -> None:
        self.turns.clear()
