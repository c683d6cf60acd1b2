"""What a request can do wrong, answered in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
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
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return problem_body(self.status, self.message, self.code, self.param)


def problem_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A request that cannot be understood: 400."""
    return RequestError(400, message, param=param, code=code)


def overloaded(seconds: int = 1) -> RequestError:
    """Too many requests are waiting: 429, and when to try again."""
    return RequestError(
        429,
        f"the server is busy: try again in {seconds} s",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def other_index() -> RequestError:
    """The index on the disk is another model's by now: 503."""
    return RequestError(
        503,
        "the index of this server was built anew with another model: start the server again with that model, or put "
        "the old index back (the server's log names both models)",
        code="index_of_another_model",
    )


def broken_index() -> RequestError:
    """The index is gone, or a file of it is damaged or another one: 503."""
    return RequestError(
        503,
        "the index of this server is gone, or one of its files was damaged or replaced: put it back, or build it again "
        "with `blip2 index build` (the server's log names the file)",
        code="index_damaged",
    )


def too_late(seconds: float) -> RequestError:
    """The time limit of a request has passed: 504."""
    return RequestError(
        504, f"no answer within {seconds:g} s: the server is busy, or asked for too much at once", code="timeout"
    )
