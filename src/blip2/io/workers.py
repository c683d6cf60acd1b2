"""A function over a list in several processes; one that is killed is started again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from blip2.errors import RunError

T = TypeVar("T")
R = TypeVar("R")
# Times in a row that processes may die without one result between.
_PATIENCE = 3


def in_processes(
    work: Callable[[T], R],
    jobs: Sequence[T],
    workers: int,
    what: str,
    progress: bool = True,
) -> Iterator[tuple[int, R]]:
    """(place, result) of every job as they are done; with one worker in this process and in order.

    Processes are spawned, not forked: threads of torch do not survive a fork. When one is killed
    (most often for want of memory) the jobs without result are given to new ones.

    Raises:
        RunError: processes die again and again.
    """
    remaining = dict(enumerate(jobs))
    with tqdm(total=len(jobs), desc=what, unit="shard", disable=not progress or not jobs) as bar:
        if workers == 1:
            for place, job in remaining.items():
                yield place, work(job)
                bar.update()
            return
        failures = 0
        while remaining:
            before = len(remaining)
            for place, result in _round(work, remaining, min(workers, len(remaining))):
                del remaining[place]
                yield place, result
                bar.update()
            failures = failures + 1 if len(remaining) == before else 0
            if failures == _PATIENCE:
                raise RunError(
                    f"{what}: processes are killed again and again, most often for want of memory: lower --workers "
                    "and run the same command; what is done is not done again"
                )


def _round(work: Callable[[T], R], jobs: dict[int, T], workers: int) -> Iterator[tuple[int, R]]:
    """Results until all are done or a process dies."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        places = {pool.submit(work, job): place for place, job in list(jobs.items())}
        for future in as_completed(places):
            try:
                result = future.result()
            except BrokenProcessPool:
                continue
            yield places[future], result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
