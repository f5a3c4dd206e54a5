"""Generate answers with a base model and its adapters, one at a time or several in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this."""
    top_k: int = 0
    """Sample from this many of the most likely tokens; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that have occurred become less likely."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._check("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        self._check("temperature", self.temperature >= 0, "0 or more")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "0 or more")
        self._check("repetition_penalty", self.repetition_penalty > 0, "above 0")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ConfigError("top_p and top_k need random sampling; set temperature above 0, or leave them out")

    def _check(self, name: str, is_legal: bool, bound: str) -> None:
        if not is_legal:
            raise ConfigError(f"{name} = {getattr(self, name)} must be {bound}")


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a prompt."""

    text: str
    tokens: int
    ended: bool
    """The model ended the answer itself; otherwise it was cut or stopped."""


class Writer:
    """Writes answers with a base model and its adapters.

    Args:
        template_file: a chat template to use instead of the tokenizer's.
        raw: use prompts as they are, without a chat template.

    Raises:
        ConfigError: the model is a classifier.
    """

    def __init__(
        self, loaded: Loaded, sampling: Sampling, *, template_file: str | Path | None = None, raw: bool = False
    ) -> None:
        if loaded.task is not TaskType.CAUSAL_LM:
            raise ConfigError(f"{', '.join(loaded.adapters)}: an adapter for {loaded.task.value} cannot generate text")
        self.loaded = loaded
        self.sampling = sampling
        self.tokenizer = loaded.tokenizer
        template = loaded.tokenizer.chat_template
        if template_file:
            template = Path(template_file).read_text(encoding="utf-8")
        self.template = Template(loaded.tokenizer, template) if template and not raw else None
        self.pad = pad_of(loaded.tokenizer)
        self.stops = self._stops()

    def tokens(self, messages: Sequence[Message], place: str = "the prompt") -> list[int]:
        """The tokens of a prompt: a conversation in the chat template, or a single text as it is.

        Raises:
            DataError: the prompt is empty, or the template refuses it.
        """
        if self.template is not None:
            text = self.template.prompt(place, messages)
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        elif [m["role"] for m in messages] == ["user"]:
            ids = self.tokenizer(messages[0]["content"]).input_ids
        else:
            raise ConfigError(f"{place} has several messages, but the model has no chat template; give chat_template")
        if not ids:
            raise DataError(f"{place} is empty")
        return list(ids)

    def together(self, names: Sequence[str]) -> list[list[str]]:
        """Group the names: the answers of a group can be generated in one batch.

        A prompt method lengthens every row, so it gets its own batch. With sampling, every name gets its own batch,
        because the random numbers of a row depend on the other rows of its batch.
        """
        if self.sampling.temperature > 0:
            return [[name] for name in names]
        prompts = self.loaded.model._state.prompts if self.loaded.adapters else ()
        mixed = [name for name in names if name not in prompts]
        groups = [mixed] if mixed else []
        for name in names:
            if name in prompts:
                groups.append([name])
        return groups

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
            names: the model for each row: one name for all rows, or one per row from a group of `together`.
            facts: arguments of the adapters' methods, with one value per row.
            streamer: gets the tokens while they are generated.
            criteria: further stopping criteria for `generate`.

        Raises:
            DataError: a prompt and its answer exceed the model's maximum length.
        """
        self.check_room(max(map(len, prompts)))
        ids, mask = self._padded(prompts)
        arguments = dict(facts or {})
        running: AbstractContextManager[Any] = nullcontext()
        if len(set(names)) == 1:
            running = self.loaded.running(names[0])
        else:
            arguments["adapter_names"] = [BASE_ROW if name == BASE else name for name in names]
        torch.manual_seed(self.sampling.seed)
        with running:
            sequences = self.loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._settings(),
                streamer=streamer,
                stopping_criteria=criteria,
                **arguments,
            )
        new_tokens = sequences[:, ids.shape[1] :].tolist()
        return [self._answer(row) for row in new_tokens]

    def check_room(self, length: int, place: str = "the prompt") -> None:
        """Raise DataError unless a prompt of `length` tokens and its answer fit into the model's maximum length."""
        config = self.loaded.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and length + self.sampling.max_new_tokens > most:
            raise DataError(
                f"{place}: {length} prompt tokens and {self.sampling.max_new_tokens} new tokens exceed the model's "
                f"maximum of {most}; shorten the prompt, or lower max_new_tokens"
            )

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts padded on the left, (batch, length), and their attention mask."""
        longest = max(map(len, prompts))
        ids = []
        mask = []
        for prompt in prompts:
            padding = longest - len(prompt)
            ids.append([self.pad] * padding + list(prompt))
            mask.append([0] * padding + [1] * len(prompt))
        device = next(self.loaded.model.parameters()).device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _settings(self) -> Any:
        from transformers import GenerationConfig

        sampling = self.sampling
        settings: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            settings = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=sorted(self.stops) or None,
            pad_token_id=self.pad,
            **settings,
        )

    def _stops(self) -> set[int]:
        """The end tokens of the model and the tokenizer, and the one that ends an answer in the chat template."""
        stops = {self.tokenizer.eos_token_id}
        model_stops = self.loaded.model.generation_config.eos_token_id
        if isinstance(model_stops, list):
            stops.update(model_stops)
        else:
            stops.add(model_stops)
        template_stop = None
        if self.template is not None:
            template_stop = self.template.stop()
        if template_stop:
            stops.add(self.tokenizer.convert_tokens_to_ids(template_stop))
        return stops - {None}

    def _answer(self, tokens: list[int]) -> Answer:
        """The answer in a list of generated tokens: those before the first end token."""
        end = next((i for i, token in enumerate(tokens) if token in self.stops), None)
        tokens = tokens[:end]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, len(tokens), end is not None)


@dataclass
class Turn:
    """A question of a conversation and the answers to it."""

    question: str
    answers: dict[str, str]
    """Texts by the name of the model."""

    def said_by(self, name: str) -> str:
        """The answer of a model, or that of the first model if this one was not asked."""
        first = next(iter(self.answers.values()))
        return self.answers.get(name, first)


@dataclass
class Conversation:
    """A conversation with one or several models; each model sees its own earlier answers."""

    writer: Writer
    system: str | None = None
    """Instructions before the first question."""
    turns: list[Turn] = field(default_factory=list)

    def messages(self, name: str, question: str) -> list[Message]:
        """The conversation so far as one model sees it, and the next question."""
        messages = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.said_by(name)})
        messages.append({"role": "user", "content": question})
        return messages

    def prompts(self, names: list[str], question: str) -> dict[str, list[int]]:
        """The tokens of the conversation and the next question for each model.

        Raises:
            DataError: the chat template refuses the conversation, or it has become too long.
        """
        prompts: dict[str, list[int]] = {}
        for name in names:
            messages = self.messages(name, question)
            prompts[name] = self.writer.tokens(messages, "the conversation")
        longest = max(map(len, prompts.values()))
        self.writer.check_room(longest, "the conversation")
        return prompts

    def add(self, question: str, answers: dict[str, str]) -> None:
        self.turns.append(Turn(question, answers))

    def reset(self) -> None:
        self.turns.clear()
