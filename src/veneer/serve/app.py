"""The routes of the server."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..data.chat import Template
from ..errors import DataError
from ..upstream.models import positions_of
from . import protocol
from .answers import ChatFormat, CompletionFormat, Format
from .choices import Choices, Job
from .engine import Engine
from .errors import Refused
from .metrics import Counted, Metrics
from .protocol import AdapterRequest, ChatRequest, CompletionRequest, Generation
from .sampling import Sampling
from .security import TOO_LARGE, Door, refused
from .tools import Form, as_dicts, form_of

LOG = logging.getLogger(__name__)
EVENTS = "text/event-stream"
BODY = 4 << 20
"""The largest body of a request, in bytes."""
PROMPTS = 64
"""Prompts in one request."""


@dataclass(frozen=True)
class Settings:
    """What the server allows."""

    most_tokens: int = 1024
    """Tokens of an answer: the limit, and the number where a request names none."""
    seconds: float = 600.0
    """How long an answer may take."""
    key: str | None = None
    """The API key; None: none is needed."""
    hosts: Sequence[str] | None = None
    """The names in the Host header that are accepted; None: all."""
    origins: Sequence[str] = ()
    """Web pages whose scripts may use the server (CORS)."""
    body: int = BODY


class Service:
    """What the routes share: the engine, the tokenizer and its chat template."""

    def __init__(self, engine: Engine, tokenizer: Any, template: Template | None, settings: Settings) -> None:
        self.engine = engine
        self.adapters = engine.adapters
        self.tokenizer = tokenizer
        self.template = template
        self.settings = settings
        self.metrics = Metrics(engine)
        self.form: Form | None = None if template is None else form_of(template)
        self.longest = positions_of(engine.adapters.base_model.config)
        self.encoding = threading.Lock()
        self.begun = int(time.time())

    # Models

    def models(self) -> list[dict[str, Any]]:
        return [self.model(name) for name in self.adapters.names()]

    def model(self, name: str) -> dict[str, Any]:
        base = self.adapters.base
        entry: dict[str, Any] = {"id": name, "object": "model", "created": self.begun, "owned_by": "veneer"}
        entry["parent"] = None if name == base else base
        return entry

    # Answers

    async def chat(self, request: ChatRequest) -> Choices:
        if self.template is None:
            raise Refused(400, "the model has no chat template; use /v1/completions", param="messages")
        names = self.adapters.resolve(request.model)
        tools = [tool.model_dump() for tool in request.tools or ()] if request.tool_choice != "none" else []
        if tools and self.form is None:
            raise Refused(400, "the model's chat template writes no tool calls; leave out tools", param="tools")
        messages = as_dicts([message.as_dict() for message in request.messages])
        prompt = await asyncio.to_thread(self._rendered, messages, tools)
        return self._choices(request, names, [prompt], request.alternatives(), self.form if tools else None)

    async def completion(self, request: CompletionRequest) -> Choices:
        names = self.adapters.resolve(request.model)
        given = request.prompts()
        if not 0 < len(given) <= PROMPTS:
            raise Refused(400, f"a request may have 1 to {PROMPTS} prompts, not {len(given)}", param="prompt")
        prompts = await asyncio.to_thread(self._encoded, given)
        return self._choices(request, names, prompts, request.alternatives(), None)

    def _rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        assert self.template is not None
        with self.encoding:
            try:
                text = self.template.prompt("messages", messages, tools or None)
            except DataError as error:
                raise Refused(400, str(error), param="messages") from None
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _encoded(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        size = self.adapters.base_model.get_input_embeddings().weight.shape[0]
        tokens: list[list[int]] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                with self.encoding:
                    tokens.append(list(self.tokenizer(prompt).input_ids))
            elif all(0 <= token < size for token in prompt):
                tokens.append(prompt)
            else:
                raise Refused(400, f"prompt: a token must be between 0 and {size - 1}", param="prompt")
        return tokens

    def _choices(
        self,
        request: ChatRequest | CompletionRequest,
        names: tuple[str, ...],
        prompts: list[list[int]],
        logprobs: int | None,
        tools: Form | None,
    ) -> Choices:
        longest = max(map(len, prompts))
        if not min(map(len, prompts)):
            raise Refused(400, "the prompt is empty", param="prompt")
        most = self._most(request.most(), longest)
        job = Job(prompts, names, _sampling(request, logprobs), most, request.n, request.stops(), tools)
        return Choices(self.engine, self.metrics, self.tokenizer, job, self.settings.seconds)

    def _most(self, wanted: int | None, prompt: int) -> int:
        """How many tokens an answer to a prompt of this length may have."""
        limit = self.settings.most_tokens
        if wanted is not None and wanted > limit:
            message = f"max_tokens = {wanted} is more than the {limit} that this server generates; ask for fewer"
            raise Refused(400, message, param="max_tokens")
        if self.longest is None:
            return wanted or limit
        room = self.longest - prompt
        if room < (wanted or 1):
            raise Refused(
                400,
                f"the model takes {self.longest} tokens, and the prompt has {prompt} beside the {wanted or 1} to "
                "generate; shorten the prompt, or lower max_tokens",
                code="context_length_exceeded",
                param="max_tokens" if prompt < self.longest else "messages",
            )
        return wanted or min(limit, room)


def _sampling(request: Generation, logprobs: int | None) -> Sampling:
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    return Sampling(temperature, top_p, max(0, request.top_k or 0), request.seed, logprobs)


async def _answered(request: Request, form: Format, body: Generation) -> Response:
    """The response with the answers: a stream, or the whole unless the client goes first."""
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(form.stream(with_usage), media_type=EVENTS, headers={"Cache-Control": "no-cache"})
    answer = asyncio.ensure_future(form.whole())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return JSONResponse(answer.result())
        return Response(status_code=499)  # nobody reads it
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def create_app(service: Service) -> Any:
    """The ASGI application. It starts and stops the engine."""
    engine = service.engine

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="veneer", lifespan=lifespan, openapi_url=None)
    _handle_errors(app)
    _add_models(app, service)
    _add_answers(app, service)
    _add_adapters(app, service)
    _add_status(app, service)
    settings = service.settings
    guarded: Any = Door(Counted(app, service.metrics), settings.key, settings.hosts, settings.body)
    if settings.origins:
        guarded = CORSMiddleware(guarded, list(settings.origins), allow_methods=["*"], allow_headers=["*"])
    return guarded


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        service.adapters.resolve(name)
        return service.model(name)


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        choices = await service.chat(body)
        return await _answered(request, ChatFormat(body.model, choices), body)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        choices = await service.completion(body)
        return await _answered(request, CompletionFormat(body.model, choices), body)


def _add_adapters(app: FastAPI, service: Service) -> None:
    engine, adapters = service.engine, service.adapters

    @app.post("/v1/load_lora_adapter")
    async def load(body: AdapterRequest) -> dict[str, str]:
        await _in_engine(engine, lambda: adapters.add(body.lora_name, engine.used()))
        return {"status": f"adapter {body.lora_name} is loaded"}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: AdapterRequest) -> dict[str, str]:
        await _in_engine(engine, lambda: adapters.remove(body.lora_name, engine.used()))
        return {"status": f"adapter {body.lora_name} is served no longer"}


async def _in_engine(engine: Engine, job: Callable[[], Any]) -> Any:
    return await asyncio.wrap_future(engine.call(job))


def _add_status(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.get("/health")
    async def health() -> Response:
        is_well = engine.thread.is_alive() and not engine.is_closing
        return JSONResponse({"status": "ok" if is_well else "stopping"}, 200 if is_well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _handle_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's format, without a path or a traceback."""

    @app.exception_handler(Refused)
    async def known(request: Request, error: Refused) -> Response:
        return refused(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = protocol.message_of(error.errors(), protocol.fields_of(request.url.path))
        return refused(Refused(400, message, param=param))

    @app.exception_handler(HTTPException)
    async def by_status(request: Request, error: HTTPException) -> Response:
        if error.status_code == TOO_LARGE.status:
            return refused(TOO_LARGE)
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return refused(Refused(error.status_code, message))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return refused(Refused(500, "the server failed; its log says why"))
