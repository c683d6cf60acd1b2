"""What the routes share: models with their queues, and the pictures that requests bring."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request

from blip2.inference import Blip2
from blip2.search.query import Hit, Index
from blip2.search.segments import Row
from blip2.server.batching import Batcher
from blip2.server.errors import RequestError
from blip2.server.images import view_of
from blip2.server.metrics import Metrics
from blip2.server.request_parsing import Intake
from blip2.server.settings import Settings
from blip2.server.worker import Worker

T = TypeVar("T")
_SHOWN = 4096  # found images whose thumbnails may be asked for


class Server:
    """What the routes share, for one of the models that are served.

    Args:
        name: of the model, as clients see it.
        index: opened with the same model.
        first: the server of the first model, where this is a further one; it shares all but model and queue.
    """

    def __init__(
        self, model: Blip2, settings: Settings, *, name: str, index: Index | None = None, first: Server | None = None
    ) -> None:
        self.settings, self.name = settings, name
        self.metrics: Metrics = first.metrics if first else Metrics()
        self.worker = Worker(model, index)
        self.batcher = Batcher(
            self.worker, queue=settings.queue, max_batch=settings.max_batch, on_batch=self.metrics.batch
        )
        self.intake: Intake = first.intake if first else Intake(settings)
        self.spec = model.image_spec
        self._numbers = itertools.count(1)
        self._shown: OrderedDict[str, Row] = OrderedDict()
        self.all: list[Server] = first.all if first else []
        self.all.append(self)
        if first is None:
            self.metrics.watch_queue(lambda: sum(each.batcher.waiting for each in self.all))

    def of(self, name: str | None) -> Server:
        """The server of a model; of the first one for None and `blip2`.

        Raises:
            RequestError: 404, no such model.
        """
        if name in (None, "blip2"):
            return self.all[0]
        for each in self.all:
            if each.name == name:
                return each
        known = ", ".join(repr(each.name) for each in self.all)
        raise RequestError(
            404,
            f"no model {str(name)[:100]!r} here: this server has {known} (or say 'blip2')",
            code="model_not_found",
            param="model",
        )

    @property
    def searching(self) -> Server:
        """The server of the model that the index belongs to; the first one where there is no index."""
        return next((each for each in self.all if each.worker.index is not None), self.all[0])

    def alone(self) -> int:
        """A number that no other request has: its kind of work goes alone."""
        return next(self._numbers)

    async def view(self, source: str, upload: bytes | None = None, param: str = "image") -> Any:
        """The picture that a field names, as the image encoder takes it [3, S, S]."""
        data = await self.intake.image(source, upload, param)
        return await self.intake.aside(lambda: view_of(data, self.spec))

    async def picture(self, source: str, upload: bytes | None = None) -> bytes:
        """The bytes of the picture that a field names, known to be decodable."""
        data = await self.intake.image(source, upload)
        await self.intake.aside(lambda: view_of(data, self.spec))
        return data

    async def run(self, request: Request, kind: Any, item: Any, *, size: int = 1) -> Any:
        """What the model makes of an item; given up when the client leaves.

        Raises:
            RequestError: 429, 504, 4xx of the work itself, or 499 when nobody waits any more.
        """
        work = self.batcher.submit(kind, item, timeout=self.settings.timeout, size=size)
        return await unless_gone(request, work)

    def show(self, hits: list[Hit]) -> list[str]:
        """Ids of found images; their thumbnails, and no others, may be asked for."""
        for hit in hits:
            self._shown[hit.row.digest] = hit.row
            self._shown.move_to_end(hit.row.digest)
        while len(self._shown) > _SHOWN:
            self._shown.popitem(last=False)
        return [hit.row.digest for hit in hits]

    def shown(self, image: str) -> Row:
        """Where an image lies that was found.

        Raises:
            RequestError: 404, no search has found it.
        """
        if image not in self._shown:
            raise RequestError(404, "no such image among those that were found", code="not_found")
        return self._shown[image]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of work, which is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestError(499, "the client left")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
