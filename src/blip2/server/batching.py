"""Requests gathered into batches: one thread owns the model, and takes together what waits together.

A lone request never waits for company: while one batch runs the next one gathers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from blip2.errors import RunError
from blip2.server.errors import RequestError, overloaded

_log = logging.getLogger("blip2.serve")

Run = Callable[[Hashable, Sequence[Any]], Sequence[Any]]


@dataclass(eq=False)
class _Entry:
    task: Hashable
    item: Any
    size: int
    future: Future[Any] = field(default_factory=Future)


class Batcher:
    """A bounded queue before one worker thread.

    Args:
        run: maps a task and the items of one batch to one result per item.
        queue: entries that may wait.
        max_batch: items that go together; an entry may count as several.
        on_batch: called with the size of every batch.
    """

    def __init__(
        self, run: Run, *, queue: int = 64, max_batch: int = 16, on_batch: Callable[[int], None] | None = None
    ) -> None:
        self._run, self._queue, self._max_batch, self._on_batch = run, queue, max_batch, on_batch
        self._waiting: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="blip2-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Entries that no batch has taken yet."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the worker takes requests."""
        return self._thread.is_alive() and not self._closed

    async def submit(self, task: Hashable, item: Any, *, timeout: float, size: int = 1) -> Any:
        """The result for `item`; a cancelled or late request leaves the queue.

        Args:
            task: entries of equal tasks may share a batch.
            timeout: seconds, waiting included.
            size: items that it counts as.

        Raises:
            RequestError: 429 the queue is full; 504 too late.
            RunError: the server is shutting down.
        """
        entry = _Entry(task, item, size)
        with self._changed:
            if self._closed:
                raise RunError("the server is shutting down")
            if len(self._waiting) >= self._queue:
                raise overloaded()
            self._waiting.append(entry)
            self._changed.notify()
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.wrap_future(entry.future)
        except TimeoutError:
            message = f"no answer within {timeout:g} s: the server is busy, or asked for too much at once"
            raise RequestError(504, message, code="timeout") from None
        finally:
            entry.future.cancel()
            with self._changed:
                if entry in self._waiting:
                    self._waiting.remove(entry)

    def close(self) -> None:
        """Take nothing more, answer what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                batch = self._take()
            batch = [entry for entry in batch if entry.future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _take(self) -> list[_Entry]:
        """The oldest entry and those of its task behind it, as many as fit."""
        first, room = self._waiting[0], self._max_batch
        batch: list[_Entry] = []
        others: deque[_Entry] = deque()
        for entry in self._waiting:
            if entry.task == first.task and (entry is first or entry.size <= room):
                batch.append(entry)
                room -= entry.size
            else:
                others.append(entry)
        self._waiting = others
        return batch

    def _answer(self, batch: list[_Entry]) -> None:
        """Run a batch; where it fails each entry is tried alone, so that none fails for another's sake."""
        if self._on_batch:
            self._on_batch(sum(entry.size for entry in batch))
        try:
            results = self._run(batch[0].task, [entry.item for entry in batch])
            answers = list(zip(batch, results, strict=True))
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            _log.warning("a batch of %d failed (%s): each is tried alone", len(batch), type(error).__name__)
            for entry in batch:
                self._answer([entry])
            return
        for entry, result in answers:
            entry.future.set_result(result)
