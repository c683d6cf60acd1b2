"""The FastAPI application: one model, its queue, and the routes.

app = create_app(blip2.load("runs/s2"), Settings(), name="s2")
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from blip2 import __version__
from blip2.errors import Blip2Error, RunError
from blip2.inference import Blip2
from blip2.search.query import Index
from blip2.server import openai_routes, openapi, page, routes
from blip2.server.errors import RequestError, problem_body
from blip2.server.request_parsing import from_validation
from blip2.server.security import Guard
from blip2.server.settings import Settings
from blip2.server.state import Server

_log = logging.getLogger("blip2.serve")
DESCRIPTION = (
    "Captions, answers, embeddings and search of one BLIP-2 model. `/v1` is OpenAI's API: its clients work unchanged. "
    'Errors are `{"error": {"message", "type", "param", "code"}}`; 429 tells in `Retry-After` when to come again.'
)


def create_app(
    model: Blip2,
    settings: Settings,
    *,
    name: str,
    index: Index | None = None,
    others: Sequence[tuple[str, Blip2, Index | None]] = (),
) -> FastAPI:
    """The application; its shutdown answers what waits.

    Args:
        name: of the model, as clients see it.
        index: opened with the same model.
        others: name, model and perhaps the index of further models, to compare; each has a queue of its own.
    """
    server = Server(model, settings, name=name, index=index)
    for other, further, its_index in others:
        Server(further, settings, name=other, index=its_index, first=server)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(each.batcher.close) for each in server.all))

    app = FastAPI(
        title="blip2",
        version=__version__,
        description=DESCRIPTION,
        lifespan=life,
        docs_url=None,  # FastAPI's loads scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    app.add_middleware(Guard, settings=settings, metrics=server.metrics)
    _answer_errors(app)
    openai_routes.register_routes(app, server)
    routes.register_routes(app, server)
    page.register_routes(app)
    openapi.register_routes(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    async def problem(_: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    async def invalid(_: Request, error: RequestValidationError) -> Response:
        refused = from_validation(list(error.errors()))
        return JSONResponse(refused.body(), refused.status)

    async def http(_: Request, error: HTTPException) -> Response:
        return JSONResponse(problem_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    async def ours(_: Request, error: Blip2Error) -> Response:
        status = 503 if isinstance(error, RunError) else 500
        _log.error("%s", error)
        return JSONResponse(problem_body(status, "the server cannot answer this; its log says why"), status)

    handlers: dict[Any, Any] = {
        RequestError: problem,
        RequestValidationError: invalid,
        StarletteHTTPException: http,
        Blip2Error: ours,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
