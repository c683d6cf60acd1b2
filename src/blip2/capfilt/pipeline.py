"""CapFilt of a folder of shards: which shards are whose, what is done already, and the manifest."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from blip2.capfilt.engines import Engine
from blip2.capfilt.settings import CapFiltSettings
from blip2.capfilt.shards import RECORDS, Job, finished
from blip2.data.shards.writer import write_record
from blip2.data.sources import shard_paths
from blip2.errors import ConfigError, DataError, RunError, os_error_as

MANIFEST = "manifest.json"


def capfilt(
    mine: list[Job], jobs: list[Job], settings: CapFiltSettings, engine: Engine | None = None
) -> dict[str, Any]:
    """CapFilt of `mine`; `manifest.json` is written when all `jobs` are done.

    Raises:
        ConfigError, CheckpointError: settings or models that cannot be used.
        DataError: a shard cannot be read.
        RunError: the folder cannot be written or holds shards of other settings.
    """
    out = Path(jobs[0].out)
    with os_error_as(RunError, f"{out}: cannot be written"):
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
    todo = [job for job in mine if finished(job, settings) is None]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} shards are done already", file=sys.stderr)
    if todo:
        for _ in (engine or Engine()).run(todo, settings):
            pass
    records = [record for job in jobs if (record := finished(job, settings)) is not None]
    manifest = _manifest(records, settings)
    if len(records) == len(jobs):
        write_record(out / MANIFEST, manifest)
    return manifest


def find_jobs(source: str, out: str) -> list[Job]:
    """A job per shard of the source.

    Raises:
        DataError: no shards, two of one name, or the folder to write is the one that is read.
    """
    paths = shard_paths(source)
    names = Counter(path.name for path in paths)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise DataError(f"{source}: {count} shards are named {name}: give them other names, or run folder by folder")
    if any(path.resolve().parent == Path(out).resolve() for path in paths):
        raise DataError(f"{out}: shards are read from it: choose another OUT")
    return [Job(str(path), out) for path in paths]


def part_of(jobs: list[Job], part: str) -> list[Job]:
    """The share `I/N` (I from 0) of the jobs: every N-th, from the I-th on."""
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ConfigError(f"part is {part!r}: it must be I/N with I from 0 to N-1")
    return jobs[int(number) :: int(count)]


def _manifest(records: list[dict[str, Any]], settings: CapFiltSettings) -> dict[str, Any]:
    names = ("samples", "web", "synthetic", "rejected", "emptied", "bad", "bytes")
    total = {name: sum(record[name] for record in records) for name in names}
    shards = [{name: record[name] for name in ("file", "samples", "bytes", "sha256")} for record in records]
    return {"format": "webdataset", "capfilt": dataclasses.asdict(settings), **total, "shards": shards}
