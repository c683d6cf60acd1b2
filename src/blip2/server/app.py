"""The FastAPI application: the models, their queues, and the routes.

app = create_app([("s2", blip2.load("runs/s2"), None)], Settings())
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from blip2 import __version__
from blip2.errors import Blip2Error, RunError
from blip2.inference import Blip2
from blip2.search.query import Index
from blip2.server import docs, openai_routes, routes
from blip2.server.errors import RequestError, error_response, from_validation
from blip2.server.security import Guard
from blip2.server.settings import Settings
from blip2.server.state import Server

_log = logging.getLogger("blip2.serve")
DESCRIPTION = (
    "Captions, answers, embeddings and search of one BLIP-2 model. `/v1` is OpenAI's API: its clients work unchanged. "
    'Errors are `{"error": {"message", "type", "param", "code"}}`; 429 says in `Retry-After` when to come again.'
)


def create_app(models: Sequence[tuple[str, Blip2, Index | None]], settings: Settings) -> FastAPI:
    """The application; its shutdown answers what waits.

    Args:
        models: each with its name, as clients see it, and perhaps the index opened with it; each has a queue of its
            own, and the first one answers where none is named.
    """
    server = Server(models, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(model.batcher.close) for model in server.models))

    app = FastAPI(
        title="blip2",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's loads scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    app.add_middleware(Guard, settings=settings, metrics=server.metrics)

    @app.exception_handler(HTTPException)  # RequestError among them
    async def refused(_: Request, error: HTTPException) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(from_validation(list(error.errors())))

    @app.exception_handler(Blip2Error)
    async def failed(_: Request, error: Blip2Error) -> Response:
        _log.error("%s", error)
        status = 503 if isinstance(error, RunError) else 500
        return error_response(RequestError(status, "the server cannot answer this; its log says why"))

    openai_routes.register_routes(app, server)
    routes.register_routes(app, server)
    docs.register_routes(app)
    return app
