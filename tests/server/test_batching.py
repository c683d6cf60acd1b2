"""The queue: what goes together, what is refused, given up, too late, and answered at the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pytest

from blip2.errors import RunError
from blip2.server.batching import Batcher
from blip2.server.errors import RequestError, bad


class Held:
    """Work that waits for its `gate`; notes its batches."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()
        self.batches: list[tuple[Hashable, list[Any]]] = []

    def __call__(self, kind: Hashable, items: Sequence[Any]) -> list[Any]:
        self.begun.set()
        assert self.gate.wait(20)
        self.batches.append((kind, list(items)))
        if "poison" in items:
            raise bad("poison")
        return [f"{kind}:{item}" for item in items]


@pytest.fixture
def held() -> Iterator[Held]:
    work = Held()
    yield work
    work.gate.set()


async def first_running(batcher: Batcher, held: Held) -> asyncio.Task[Any]:
    task = asyncio.create_task(batcher.submit("a", "first", timeout=20))
    await asyncio.to_thread(held.begun.wait, 20)
    return task


def submitted(batcher: Batcher, kind: str, items: Sequence[Any], timeout: float = 20) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(batcher.submit(kind, item, timeout=timeout)) for item in items]


async def until_waiting(batcher: Batcher, count: int) -> None:
    while batcher.waiting != count:
        await asyncio.sleep(0.001)


def test_what_waits_together_goes_together(held: Held) -> None:
    async def run() -> list[Any]:
        batcher = Batcher(held, queue=64, max_batch=3)
        tasks = [await first_running(batcher, held), *submitted(batcher, "a", [1, 2]), *submitted(batcher, "b", [3])]
        tasks += submitted(batcher, "a", [4, 5])
        await until_waiting(batcher, 5)
        held.gate.set()
        results = await asyncio.gather(*tasks)
        batcher.close()
        return results

    assert asyncio.run(run()) == ["a:first", "a:1", "a:2", "b:3", "a:4", "a:5"]
    assert held.batches == [("a", ["first"]), ("a", [1, 2, 4]), ("b", [3]), ("a", [5])]


def test_an_entry_may_count_as_several(held: Held) -> None:
    async def run() -> None:
        batcher = Batcher(held, max_batch=4)
        tasks = [await first_running(batcher, held)]
        for item, size in (("x", 3), ("y", 2), ("z", 1)):
            tasks.append(asyncio.create_task(batcher.submit("a", item, timeout=20, size=size)))
        await until_waiting(batcher, 3)
        held.gate.set()
        await asyncio.gather(*tasks)
        batcher.close()

    asyncio.run(run())
    assert [items for _, items in held.batches] == [["first"], ["x", "z"], ["y"]]


def test_a_full_queue_refuses(held: Held) -> None:
    async def run() -> None:
        batcher = Batcher(held, queue=2)
        tasks = [await first_running(batcher, held), *submitted(batcher, "a", [1, 2])]
        await until_waiting(batcher, 2)
        with pytest.raises(RequestError) as caught:
            await batcher.submit("a", 3, timeout=20)
        assert caught.value.status == 429
        assert int(caught.value.headers["Retry-After"]) >= 1
        held.gate.set()
        assert await asyncio.gather(*tasks) == ["a:first", "a:1", "a:2"]
        assert await batcher.submit("a", 3, timeout=20) == "a:3"
        batcher.close()

    asyncio.run(run())


def test_late_and_cancelled_entries_leave_the_queue(held: Held) -> None:
    async def run() -> None:
        batcher = Batcher(held)
        running = await first_running(batcher, held)
        late, gone, kept = (
            submitted(batcher, "a", ["late"], timeout=0.05)[0],
            *submitted(batcher, "a", ["gone", "kept"]),
        )
        await until_waiting(batcher, 3)
        gone.cancel()
        with pytest.raises(RequestError) as caught:
            await late
        assert caught.value.status == 504
        await until_waiting(batcher, 1)
        held.gate.set()
        assert await asyncio.gather(running, kept) == ["a:first", "a:kept"]
        batcher.close()

    asyncio.run(run())
    assert [items for _, items in held.batches] == [["first"], ["kept"]]


def test_one_bad_request_spoils_no_other(held: Held) -> None:
    async def run() -> list[Any]:
        batcher = Batcher(held)
        tasks = [await first_running(batcher, held), *submitted(batcher, "a", [1, "poison", 2])]
        await until_waiting(batcher, 3)
        held.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert await batcher.submit("a", "after", timeout=20) == "a:after"
        batcher.close()
        return results

    first, one, poison, two = asyncio.run(run())
    assert [first, one, two] == ["a:first", "a:1", "a:2"]
    assert isinstance(poison, RequestError)


def test_closing_answers_what_was_taken_and_takes_no_more(held: Held) -> None:
    async def run() -> None:
        batcher = Batcher(held)
        tasks = [await first_running(batcher, held), *submitted(batcher, "a", [1, 2])]
        await until_waiting(batcher, 2)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        while batcher.alive:
            await asyncio.sleep(0.001)
        with pytest.raises(RunError):
            await batcher.submit("a", 3, timeout=20)
        held.gate.set()
        assert await asyncio.gather(*tasks) == ["a:first", "a:1", "a:2"]
        await closing

    asyncio.run(run())
