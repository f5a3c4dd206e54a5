"""What every request passes before it reaches a route: who may ask, from where, and how much it may send."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from .errors import Refused

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/health",)
"""Routes that need no key."""
TOO_LARGE = Refused(413, "the request is too large; send less", code="request_too_large")


class Door:
    """An ASGI middleware that refuses requests without the key, with a foreign Host, or with too large a body.

    Args:
        app: what it guards.
        key: the API key; None: none is needed.
        hosts: the names in the Host header that are accepted; None: all. A page that a browser shows can reach a
            server on this machine under a name of its own (DNS rebinding), which this prevents.
        most: the largest body, in bytes.
    """

    def __init__(self, app: Any, key: str | None, hosts: Collection[str] | None, most: int) -> None:
        self.app = app
        self.key = None if key is None else key.encode()
        self.hosts = hosts
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refused(refusal)(scope, receive, send)
            return
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most:
                raise HTTPException(TOO_LARGE.status)  # FastAPI passes on no other error
            return message

        await self.app(scope, counted, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Refused | None:
        if self.hosts is not None and host_of(headers.get(b"host", b"")) not in self.hosts:
            return Refused(403, "this server answers under the name of this machine only", code="wrong_host")
        if self.key is not None and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
                return Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            return TOO_LARGE
        return None


def host_of(header: bytes) -> str:
    """The name in a Host header, without the port."""
    text = header.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def refused(refusal: Refused) -> JSONResponse:
    """The response for a refused request."""
    headers = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body(), refusal.status, headers=headers)
