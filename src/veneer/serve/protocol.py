"""The bodies of requests: OpenAI's fields that the server knows, each with its type and bounds.

A field that is not here is an error, unless it is empty or has the value that changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import nearest

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
}
"""Fields of OpenAI's that the server does not support, with the values that change nothing."""
MOST_CHOICES = 16
MOST_STOPS = 16
MOST_LOGPROBS = 20
EMPTY: tuple[Any, ...] = (None, "", [], {})


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, content: Any) -> Any:
        """Leave out unknown fields that change nothing: clients send many of them."""
        if not isinstance(content, dict):
            return content
        kept = {}
        for name, value in content.items():
            is_known = name in cls.model_fields
            if is_known or not (value in EMPTY or value in NEUTRAL.get(name, ())):
                kept[name] = value
        return kept


class Part(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Function(Body):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, text: str) -> str:
        try:
            is_object = isinstance(json.loads(text or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ValueError("must be a JSON object")
        return text


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: Function


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = self.model_dump(exclude_none=True)
        message["role"] = "system" if self.role == "developer" else self.role
        message["content"] = content or ""
        return message


class StreamOptions(Body):
    include_usage: bool = False


class Generation(Body):
    """What requests for chats and for completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Not OpenAI's, but vLLM's; -1 or 0: all tokens."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    """Ignored, as is `metadata`."""
    metadata: dict[str, Any] | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @field_validator("stop")
    @classmethod
    def _has_few(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS or not all(0 < len(text) <= 1000 for text in stops):
            raise ValueError(f"must be at most {MOST_STOPS} texts, each of 1 to 1000 characters")
        return stop


class Tool(Body):
    type: Literal["function"]
    function: dict[str, Any]
    """A name, a description and a JSON schema of the parameters, which the chat template writes into the prompt."""

    @field_validator("function")
    @classmethod
    def _has_name(cls, function: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(function.get("name"), str):
            raise ValueError("needs a name")
        return function


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    def most(self) -> int | None:
        """The number of tokens that the answer may have."""
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def most(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default

    def alternatives(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class AdapterRequest(Body):
    """vLLM's request to load or unload an adapter, without its path."""

    lora_name: str


def message_of(errors: Sequence[dict[str, Any]], fields: Collection[str]) -> tuple[str, str | None]:
    """A sentence for the errors that pydantic found, and the field that is wrong.

    Args:
        fields: the names of the fields that the request may have.
    """
    error = max(errors, key=lambda error: len(error["loc"]))  # of a union, the form that came furthest
    place = [str(part) for part in error["loc"] if part != "body" and not _is_form(part)]
    name = ".".join(place) or None
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        if place[-1] in NEUTRAL:
            return f"{name} is not supported; leave it out", name
        return f"there is no field {name!r}{nearest(place[-1], fields)}", name
    if error["type"] == "missing":
        return f"the field {name!r} is missing" if name else "the request needs a JSON body (application/json)", name
    if name is None:
        return f"the request's body: {reason}", None
    return f"{name}: {reason[:1].lower()}{reason[1:]}", name


def _is_form(part: Any) -> bool:
    """Whether a part of an error's place is the form of a union that was tried, such as "list[str]"."""
    return isinstance(part, str) and (part in ("str", "int") or part.startswith("list["))


def fields_of(path: str) -> Collection[str]:
    """The fields of the requests for a route."""
    bodies: dict[str, type[Body]] = {"chat/completions": ChatRequest, "completions": CompletionRequest}
    body = bodies.get(path.removeprefix("/v1/"), AdapterRequest)
    return list(body.model_fields)
