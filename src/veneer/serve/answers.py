"""OpenAI's response objects, whole or in the chunks of a stream, for chats and for completions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .choices import Choices, Piece
from .errors import Refused
from .sampling import Token


class Format:
    """The objects of one response.

    Args:
        model: what the request asked for.
        choices: the answers.
    """

    kind: str
    kind_of_chunk: str
    prefix: str

    def __init__(self, model: str, choices: Choices) -> None:
        self.choices = choices
        self.tokenizer = choices.tokenizer
        self.head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}

    async def whole(self) -> dict[str, Any]:
        """The response when all answers are finished."""
        pieces: list[list[Piece]] = [[] for _ in self.choices.answers]
        async for piece in self.choices.pieces():
            pieces[piece.index].append(piece)
        finished = [self.choice(index, parts) for index, parts in enumerate(pieces)]
        return {**self.head, "object": self.kind, "choices": finished, "usage": self.usage()}

    async def stream(self, with_usage: bool) -> AsyncIterator[str]:
        """The response as server-sent events."""
        head = {**self.head, "object": self.kind_of_chunk}
        nothing = {"usage": None} if with_usage else {}
        try:
            for choice in self.openings():
                yield event({**head, "choices": [choice], **nothing})
            async for piece in self.choices.pieces():
                if self.is_shown(piece):
                    yield event({**head, "choices": [self.part(piece)], **nothing})
        except Refused as error:
            yield event(error.body())
            return
        if with_usage:
            yield event({**head, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def is_shown(self, piece: Piece) -> bool:
        """Whether a piece has something for the client: a token that only begins a character has not."""
        has_logprobs = piece.token is not None and self.choices.job.sampling.logprobs is not None
        return bool(piece.text or piece.calls or piece.reason or has_logprobs)

    def usage(self) -> dict[str, int]:
        prompt = self.choices.prompt_tokens
        generated = self.choices.generated
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def openings(self) -> Sequence[dict[str, Any]]:
        """The parts that come before the first token."""
        return ()

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def part(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer, in a stream."""
        raise NotImplementedError


class ChatFormat(Format):
    kind = "chat.completion"
    kind_of_chunk = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def openings(self) -> Sequence[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        count = len(self.choices.answers)
        return [{"index": index, "delta": delta, "finish_reason": None} for index in range(count)]

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        last = pieces[-1]
        text = "".join(piece.text for piece in pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if last.calls:
            message["content"] = text or None
            message["tool_calls"] = _calls(last)
        logprobs = self.logprobs([piece.token for piece in pieces if piece.token is not None])
        return {"index": index, "message": message, "finish_reason": last.reason, "logprobs": logprobs}

    def part(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(_calls(piece))]
        logprobs = None if piece.token is None else self.logprobs([piece.token])
        return {"index": piece.index, "delta": delta, "finish_reason": piece.reason, "logprobs": logprobs}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.choices.job.sampling.logprobs is None:
            return None
        entries = []
        for token in tokens:
            top = [self._entry(*pair) for pair in token.top]
            entries.append({**self._entry(token.id, token.logprob or 0.0), "top_logprobs": top})
        return {"content": entries}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class CompletionFormat(Format):
    kind = kind_of_chunk = "text_completion"
    prefix = "cmpl-"

    def __init__(self, model: str, choices: Choices) -> None:
        super().__init__(model, choices)
        self.offsets = [0] * len(choices.answers)
        """The characters of each answer so far."""

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        logprobs = self.logprobs(index, [piece.token for piece in pieces if piece.token is not None])
        return {"index": index, "text": text, "finish_reason": pieces[-1].reason, "logprobs": logprobs}

    def part(self, piece: Piece) -> dict[str, Any]:
        logprobs = None if piece.token is None else self.logprobs(piece.index, [piece.token])
        return {"index": piece.index, "text": piece.text, "finish_reason": piece.reason, "logprobs": logprobs}

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.choices.job.sampling.logprobs is None:
            return None
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = self.token_text(token.id)
            lists["tokens"].append(text)
            lists["token_logprobs"].append(token.logprob)
            lists["top_logprobs"].append({self.token_text(other): logprob for other, logprob in token.top})
            lists["text_offset"].append(self.offsets[index])
            self.offsets[index] += len(text)
        return lists


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _calls(piece: Piece) -> list[dict[str, Any]]:
    calls = []
    for call in piece.calls:
        function = {"name": call.name, "arguments": call.arguments}
        calls.append({"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function})
    return calls
