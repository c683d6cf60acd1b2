"""Where shards are worked on: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blip2.capfilt.models import Captioner, Ranker, open_models
from blip2.capfilt.settings import CapFiltSettings
from blip2.capfilt.shards import Job, filter_shard
from blip2.errors import Blip2Error, ConfigError, RunError
from blip2.io.workers import in_processes

# One pair of models in a process.
_MODELS: dict[tuple[CapFiltSettings, str], tuple[Captioner | None, Ranker]] = {}


@dataclass(frozen=True)
class Engine:
    """How the work is shared.

    Args:
        workers: processes, each with models of its own.
        threads: of torch in each; None shares the cores equally. Another number of threads may
            round a sum differently, and then another caption is drawn.
        device: `auto` is CUDA where there is one, the cards taken in turn.
    """

    name: str = "local"
    workers: int = 1
    threads: int | None = None
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.name not in ("local", "ray"):
            raise ConfigError(f"engine is {self.name!r}: it must be local or ray")
        if self.workers < 1 or (self.threads is not None and self.threads < 1):
            raise ConfigError("workers and threads must be 1 or more")

    def run(self, jobs: list[Job], settings: CapFiltSettings) -> Iterator[dict[str, Any]]:
        """Records of the jobs as they are done."""
        threads = self.threads or max((os.cpu_count() or 1) // self.workers, 1)
        if self.name == "ray":
            yield from _with_ray(jobs, settings, self.workers, threads, self.device)
            return
        inner = self.progress and self.workers == 1
        work = partial(_work, settings=settings, threads=threads, device=self.device, progress=inner)
        for _, record in in_processes(work, jobs, self.workers, "capfilt", self.progress):
            yield record


def _work(job: Job, *, settings: CapFiltSettings, threads: int, device: str, progress: bool = False) -> dict[str, Any]:
    """One shard in this process; the models are loaded for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        known = (settings, device)
        if known not in _MODELS:
            _MODELS.clear()
            _MODELS[known] = open_models(settings, _own_card(device))
        captioner, ranker = _MODELS[known]
        return filter_shard(job, settings, captioner, ranker, progress=progress)
    finally:
        torch.set_num_threads(before)


def _own_card(device: str) -> str:
    """The card of this process where several share a machine."""
    number = multiprocessing.current_process().name.rpartition("-")[2]
    if device == "auto" and number.isdigit() and torch.cuda.device_count() > 1:
        return f"cuda:{(int(number) - 1) % torch.cuda.device_count()}"
    return device


class _RayWorker:
    """An actor of the pool: holds the models, takes a shard at a time."""

    def __init__(self, settings: CapFiltSettings, threads: int, device: str) -> None:
        self.settings, self.threads, self.device = settings, threads, device

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            job = Job(row["source"], row["out"])
            record = _work(job, settings=self.settings, threads=self.threads, device=self.device)
            return {"file": record["file"], "error": ""}
        except Blip2Error as error:  # an error for people travels as a value: Ray would wrap it in its own
            return {"file": "", "error": str(error)}


def _with_ray(
    jobs: list[Job], settings: CapFiltSettings, workers: int, threads: int, device: str
) -> Iterator[dict[str, Any]]:
    """The jobs on a pool of Ray actors; Ray restarts an actor that is killed and gives its shard again.

    Raises:
        ConfigError: Ray is not installed.
        RunError: a worker could not go on.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"engine ray needs Ray ({error}): pip install 'blip2[ray]', or use --engine local") from None
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="error")
    rows = [{"source": os.path.abspath(job.source), "out": os.path.abspath(job.out)} for job in jobs]
    cards = 1 if device != "cpu" and ray.cluster_resources().get("GPU") else 0
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _RayWorker,
        fn_constructor_args=(settings, threads, device),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
        num_gpus=cards,
    )
    try:
        for row in data.iter_rows():
            if row["error"]:
                raise RunError(row["error"])
            yield row
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise RunError(f"engine ray: a worker could not go on: {cause}") from error
