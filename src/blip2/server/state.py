"""What the routes share: the served models with their queues, the reading of requests, and the figures."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser
from torch import Tensor

from blip2.inference import Blip2
from blip2.search.query import Hit, Index
from blip2.search.segments import Row
from blip2.server.batching import Batcher
from blip2.server.errors import RequestError, bad, from_validation
from blip2.server.images import checked_image, film_views, from_data_url, view_of
from blip2.server.schemas import Given
from blip2.server.settings import Settings
from blip2.server.worker import Generated, Worker

M = TypeVar("M", bound=Given)
T = TypeVar("T")
_UPLOAD = "upload:"  # stands in a form's fields for its file
_DECODING = 4  # images decoded at a time: each may take a few hundred MB
_THUMBNAILS = 4096  # images found by searches whose thumbnails may be requested


class Media(NamedTuple):
    """An image or a film of a message, by its URL."""

    url: str
    film: bool = False


class Metrics:
    """Figures for Prometheus, in a registry of the server's own, so that two may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("blip2_requests", "Requests answered", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "blip2_request_seconds",
            "Time from a request's head to its answer's end",
            ["path"],
            registry=self.registry,
            buckets=(0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120),
        )
        self.batches = Histogram(
            "blip2_batch_size",
            "Items that went through the model together",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self.waiting = Gauge("blip2_queue_waiting", "Requests that wait for the model", registry=self.registry)
        self.open = Gauge("blip2_requests_open", "Requests being answered", registry=self.registry)
        self.tokens = Counter("blip2_tokens", "Tokens read and written", ["kind"], registry=self.registry)

    def count_tokens(self, generated: Generated) -> None:
        """Add the tokens of an answer."""
        self.tokens.labels("prompt").inc(generated.prompt_tokens)
        self.tokens.labels("completion").inc(sum(generated.tokens))


class ServedModel:
    """A model under its name, with a queue of its own.

    Args:
        index: opened with the same model.
    """

    def __init__(self, name: str, model: Blip2, index: Index | None, settings: Settings, metrics: Metrics) -> None:
        self.name, self.spec, self.timeout = name, model.image_spec, settings.timeout
        self.worker = Worker(model, index)
        self.batcher = Batcher(
            self.worker, queue=settings.queue, max_batch=settings.max_batch, on_batch=metrics.batches.observe
        )

    async def run(self, request: Request, task: Hashable, item: Any, *, size: int = 1) -> Any:
        """The result of a task for an item; given up when the client leaves.

        Raises:
            RequestError: 429, 504, 4xx of the work itself, or 499 when nobody waits any more.
        """
        work = asyncio.create_task(self.batcher.submit(task, item, timeout=self.timeout, size=size))
        left = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise RequestError(499, "the client left")
        finally:
            work.cancel()
            left.cancel()
            await asyncio.gather(work, left, return_exceptions=True)


class Server:
    """The served models, and what reads requests within the limits of the settings.

    Args:
        models: name, model, and perhaps the index opened with it; the first one answers where none is named.
    """

    def __init__(self, models: Sequence[tuple[str, Blip2, Index | None]], settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.models = [ServedModel(*model, settings, self.metrics) for model in models]
        self.metrics.waiting.set_function(lambda: sum(model.batcher.waiting for model in self.models))
        self._decoding = asyncio.Semaphore(_DECODING)
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def model(self, name: str | None) -> ServedModel:
        """A model by its name; the first one for None and `blip2`.

        Raises:
            RequestError: 404, no such model.
        """
        if name in (None, "blip2"):
            return self.models[0]
        for model in self.models:
            if model.name == name:
                return model
        known = ", ".join(repr(model.name) for model in self.models)
        raise RequestError(
            404,
            f"no model {str(name)[:100]!r} here: this server has {known} (or say 'blip2')",
            code="model_not_found",
            param="model",
        )

    # -- requests -----------------------------------------------------------------------------

    async def fields(self, request: Request, shape: type[M]) -> tuple[M, bytes | None]:
        """The fields of a JSON body or a form and, from a form, the bytes of its file `image`.

        Raises:
            RequestError: 400 fields that cannot be used; 415 neither JSON nor a form.
        """
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        try:
            if kind == "multipart/form-data":
                values, upload = await self._form(request)
                return shape.model_validate(values), upload
            if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
                return shape.model_validate_json(await request.body()), None
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False, include_input=False)) from None
        raise RequestError(415, "send JSON (application/json) or a form (multipart/form-data)")

    async def _form(self, request: Request) -> tuple[dict[str, Any], bytes | None]:
        parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=32, max_part_size=2**20)
        parser.spool_max_size = self.settings.max_body + 1  # uploads stay in memory
        try:
            form = await parser.parse()
        except Exception:  # python-multipart raises its own, Starlette its own
            raise bad("the form cannot be read: send multipart/form-data with one file `image`") from None
        values: dict[str, Any] = {}
        upload = None
        try:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "image":
                        raise bad("the file of a form must be named `image`", "image")
                    values["image"], upload = _UPLOAD, await value.read()
                elif name == "history":
                    try:
                        values[name] = from_json(value)
                    except ValueError:
                        raise bad(f"{name}: not valid JSON", name) from None
                elif value != "":
                    values[name] = value
        finally:
            await form.close()
        return values, upload

    async def image(self, source: str, upload: bytes | None = None, param: str = "image") -> bytes:
        """The checked bytes of the image that a field names.

        Raises:
            RequestError: 4xx, what is wrong with it.
        """
        upload = await self._bytes(source, upload, param)
        return await self.decode(lambda: checked_image(upload, self.settings.max_pixels))

    async def _bytes(self, source: str, upload: bytes | None, param: str, *, film: bool = False) -> bytes:
        """What a field names: of an upload, an allowed address or a data URL."""
        settings = self.settings
        if source[:8].lower().startswith(("http://", "https://")):
            if not settings.url_hosts:
                raise bad("this server fetches no remote images: send the image as a data URL", param, "url_refused")
            from blip2.server.url_fetch import fetch

            seconds = min(20.0, settings.timeout)
            upload = await asyncio.to_thread(
                fetch, source, settings.url_hosts, limit=settings.max_body, timeout=seconds
            )
        elif source != _UPLOAD or upload is None:
            upload = await asyncio.to_thread(from_data_url, source, param, film=film)
        return upload

    async def views(self, model: ServedModel, media: Sequence[Media], param: str = "messages") -> Tensor:
        """Images and films of one question as the image encoder takes them: [3, S, S], or [I, 3, S, S] of several.

        Raises:
            RequestError: 4xx, what is wrong with them; 400 more than `max_images`.
        """
        count, most = sum(model.spec.frames if item.film else 1 for item in media), self.settings.max_images
        if count > most:
            raise bad(f"messages: {count} images and frames: at most {most}", param, "too_many_images")
        parts = []
        for url, film in media:
            if film:
                data = await self._bytes(url, None, param, film=True)
                parts.append(await self.decode(partial(film_views, data, model.spec, self.settings.max_pixels)))
            else:
                parts.append((await self.view(model, url, param=param))[None])
        views = torch.cat(parts)
        return views if len(views) > 1 else views[0]

    async def view(self, model: ServedModel, source: str, upload: bytes | None = None, param: str = "image") -> Tensor:
        """The image that a field names, as the model's image encoder takes it [3, S, S]."""
        data = await self.image(source, upload, param)
        return await self.decode(lambda: view_of(data, model.spec))

    async def decodable(self, model: ServedModel, source: str, upload: bytes | None = None) -> bytes:
        """The bytes of the image that a field names, once it could be decoded."""
        data = await self.image(source, upload)
        await self.decode(lambda: view_of(data, model.spec))
        return data

    async def decode(self, work: Callable[[], T]) -> T:
        """Run work on images in a thread, a few at a time."""
        async with self._decoding:
            return await asyncio.to_thread(work)

    # -- thumbnails ---------------------------------------------------------------------------

    def allow_thumbnails(self, hits: list[Hit]) -> None:
        """The thumbnails of images that a search found, and no others, may be requested."""
        for hit in hits:
            self._rows[hit.row.digest] = hit.row
            self._rows.move_to_end(hit.row.digest)
        while len(self._rows) > _THUMBNAILS:
            self._rows.popitem(last=False)

    def row(self, image: str) -> Row:
        """Where an image lies that a search found, by its digest.

        Raises:
            RequestError: 404, no search has found it.
        """
        if image not in self._rows:
            raise RequestError(404, "no such image among those that were found", code="not_found")
        return self._rows[image]


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
