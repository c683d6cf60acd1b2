"""What a request can do wrong, answered in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

# Pydantic's errors of another type than was expected, and its names of types inside a place.
_EXPECTED = {
    **{
        "string_type": "a string",
        "list_type": "a list",
        "model_type": "an object",
        "model_attributes_type": "an object",
    },
    **{"int_type": "a whole number", "dict_type": "an object", "bool_type": "true or false"},
}
_TYPE_TAG = re.compile(r"(constrained-)?str|int|float|bool|none|[A-Z]\w*|.*\[.*\].*")
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
    """Pydantic's errors as a 400 in one line.

    Of a field that may have several types pydantic reports each of them: what is farthest inside is what was meant,
    and where nothing was, all types are named, and what was sent.
    """
    field = errors[0]["loc"][:2]
    about = [error for error in errors if error["loc"][: len(field)] == field]
    deepest = max(about, key=lambda error: len(_path(error)))
    types = [error for error in about if len(_path(error)) == len(_path(deepest)) and error["type"] in _EXPECTED]
    message = str(deepest["msg"]).removeprefix("Value error, ")
    if len(types) > 1:
        message = f"must be {' or '.join(dict.fromkeys(_EXPECTED[error['type']] for error in types))}"
    name = ".".join(_path(deepest))
    return bad((f"{name}: {message}" if name else message)[:500], name[:200] or None, "invalid_value")


def _path(error: Any) -> list[str]:
    """Where an error is, without pydantic's names for the types that it tried."""
    return [str(part) for part in error["loc"] if part != "body" and not _TYPE_TAG.fullmatch(str(part))]


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
