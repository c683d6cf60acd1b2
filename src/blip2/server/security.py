"""What stands before every route: who may ask, how much, from where; and the headers of every answer."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from blip2.server.errors import RequestError, overloaded, problem_body
from blip2.server.metrics import Metrics
from blip2.server.settings import Settings, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_log = logging.getLogger("blip2.serve")
_OPEN = {"/", "/healthz", "/static/page.css", "/static/page.js"}  # without a key
_BODY_SECONDS = 30.0
_HELD = 512 * 2**20  # bytes of all bodies together
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware.

    Without a key only this machine may ask, and no web page of another origin: names that DNS points
    here and requests that a browser sends for another page are refused.
    """

    def __init__(self, app: Any, *, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._open = self._held = 0
        metrics.watch_open(lambda: self._open)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = _Answer(send)
        begun = time.monotonic()
        try:
            await self._answered(scope, receive, answer)
        except RequestError as problem:
            await answer.problem(problem)
        except Exception:
            _log.exception("a request failed")
            await answer.problem(RequestError(500, "the server failed; its log says why"))
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, answer.status, time.monotonic() - begun)

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._require_origin(headers)
        self._require_key(scope["path"], headers)
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, answer)
            return
        if self._open >= self.settings.queue + self.settings.max_batch:
            raise overloaded()
        self._open += 1
        body = b""
        try:
            body = await self._body(headers, receive)
            self._held += len(body)
            await self.app(scope, _replayed(body, receive), answer)
        finally:
            self._open -= 1
            self._held -= len(body)

    def _require_origin(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.settings.api_key is None and not is_loopback(_name(host)):
            raise RequestError(403, "this server answers to 127.0.0.1 and localhost only", code="host_refused")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise RequestError(403, "requests of other web pages are refused", code="origin_refused")

    def _require_key(self, path: str, headers: dict[str, str]) -> None:
        if self.settings.api_key is None or path in _OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.settings.api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError(
                401,
                "this server asks for a key: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit = self.settings.max_body
        too_large = RequestError(
            413, f"the request has more than {limit // 2**20} MiB: send a smaller image", code="body_too_large"
        )
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(min(_BODY_SECONDS, self.settings.timeout)):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(499, "the client left")
                    data += message.get("body", b"")
                    if len(data) > limit:
                        raise too_large
                    if len(data) + self._held > _HELD:
                        raise overloaded()
                    if not message.get("more_body"):
                        return bytes(data)
        except TimeoutError:
            raise RequestError(408, "the request's body did not arrive in time", code="timeout") from None


class _Answer:
    """`send` with the headers of every answer; notes the status."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 0

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            have = {name.lower() for name, _ in message["headers"]}
            extra = {"cache-control": "no-store", **HEADERS}
            added = [(n.encode(), v.encode()) for n, v in extra.items() if n.encode() not in have]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)

    async def problem(self, problem: RequestError) -> None:
        if self.status:  # begun already: nothing can be said any more
            return
        body = json.dumps(problem_body(problem.status, problem.message, problem.code, problem.param)).encode()
        plain = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers}
        if problem.status in (408, 413, 429):
            plain["connection"] = "close"  # the rest of the body is not read
        headers = [(name.lower().encode(), value.encode()) for name, value in plain.items()]
        await self({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The whole body at once, then whatever comes (that the client left)."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
