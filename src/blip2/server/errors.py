"""What a request can do wrong, answered in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(HTTPException):
    """A request that is refused or could not be answered.

    Args:
        status: HTTP status.
        message: for whoever sent it; says what to do.
        code: short name for programs.
        param: the field at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.status, self.code, self.param = status, code, param


def bad(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A request that cannot be understood: 400."""
    return RequestError(400, message, param=param, code=code)


def overloaded() -> RequestError:
    """Too many requests are waiting: 429, and when to try again."""
    return RequestError(429, "the server is busy: try again in 1 s", code="queue_full", headers={"Retry-After": "1"})


def from_validation(errors: list[Any]) -> RequestError:
    """The first of pydantic's errors as a 400."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{field}: {first['msg']}" if field else str(first["msg"])
    return bad(message[:500], field[:200] or None, "invalid_value")


def error_response(error: StarletteHTTPException) -> JSONResponse:
    """An error in OpenAI's shape."""
    status = error.status_code
    content = {
        "message": str(error.detail),
        "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
    }
    return JSONResponse({"error": content}, status, error.headers)
