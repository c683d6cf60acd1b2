"""What stands before every route: who may ask, how much, from where; and the headers of every answer."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2.server.errors import RequestError, error_response, overloaded
from blip2.server.settings import Settings, is_loopback
from blip2.server.state import Metrics

_log = logging.getLogger("blip2.serve")
_OPEN = {"/", "/healthz", "/static/page.css", "/static/page.js"}  # without a key
_BODY_SECONDS = 30.0
_BODIES = 512 * 2**20  # bytes of all bodies together
HEADERS = {
    "cache-control": "no-store",
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

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._open = self._bytes = 0  # requests with a body, and the bytes of these
        metrics.open.set_function(lambda: self._open)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        status, begun = 0, time.monotonic()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._pass_on(scope, receive, answer)
        except Exception as error:
            if not isinstance(error, RequestError):
                _log.exception("a request failed")
                error = RequestError(500, "the server failed; its log says why")
            if not status:  # else the answer has begun, and nothing can be said any more
                response = error_response(error)
                if error.status in (408, 413, 429):
                    response.headers["connection"] = "close"  # the rest of the body is not read
                await response(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - begun)

    async def _pass_on(self, scope: Scope, receive: Receive, answer: Send) -> None:
        headers = Headers(scope=scope)
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
            self._bytes += len(body)
            await self.app(scope, _replayed(body, receive), answer)
        finally:
            self._open -= 1
            self._bytes -= len(body)

    def _require_origin(self, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.settings.api_key is None and not is_loopback(name):
            raise RequestError(403, "this server answers to 127.0.0.1 and localhost only", code="host_refused")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host:
            raise RequestError(403, "requests of other web pages are refused", code="origin_refused")

    def _require_key(self, path: str, headers: Headers) -> None:
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

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
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
                    if len(data) + self._bytes > _BODIES:
                        raise overloaded()
                    if not message.get("more_body"):
                        return bytes(data)
        except TimeoutError:
            raise RequestError(408, "the request's body did not arrive in time", code="timeout") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then what the client sends (that it left)."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
