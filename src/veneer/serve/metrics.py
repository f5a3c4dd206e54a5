"""What `/metrics` shows, in Prometheus' format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The measurements of one server. Their labels are statuses and routes, never what a request contains."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._made(Counter, "veneer_requests", "Finished requests", ["route", "status"])
        self.prompt_tokens = self._made(Counter, "veneer_prompt_tokens", "Tokens of prompts")
        self.tokens = self._made(Counter, "veneer_generated_tokens", "Tokens of answers")
        self.first = self._made(Histogram, "veneer_first_token_seconds", "Time to an answer's first token", SECONDS)
        self.whole = self._made(Histogram, "veneer_answer_seconds", "Time to an answer's end", SECONDS)
        gauges = {
            "veneer_answers_running": ("Answers that run", lambda: len(engine.running())),
            "veneer_answers_waiting": ("Answers in the queue", lambda: len(engine.waiting)),
            "veneer_cache_positions": ("Positions of the cache that running answers take", engine.positions),
            "veneer_cache_positions_limit": ("Positions that the cache holds", lambda: engine.limits.positions),
            "veneer_adapters_loaded": ("Adapters in memory", lambda: len(engine.adapters.loaded)),
        }
        for name, (title, read) in gauges.items():
            self._made(Gauge, name, title).set_function(read)

    def _made(self, kind: Any, name: str, title: str, details: Any = ()) -> Any:
        if kind is Histogram:
            return Histogram(name, title, buckets=details, registry=self.registry)
        return kind(name, title, details, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counted:
    """An ASGI middleware that counts the requests by route and status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def noted(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
