"""The errors that a request can get, in OpenAI's format."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request that gets an error instead of an answer.

    Args:
        status: the HTTP status.
        message: what was asked, what was found and what to do; without paths.
        code: OpenAI's word for the error, such as "model_not_found".
        param: the field of the request that is wrong.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}
        return {"error": error}


def _kind(status: int) -> str:
    """OpenAI's type of the errors with a status."""
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
