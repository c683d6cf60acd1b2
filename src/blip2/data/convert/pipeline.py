"""The work of `blip2 data convert`: look at every image, decide what stays, write the shards.

Looking and writing are shared by processes, a unit at a time. Each unit and each shard leaves a
record in `OUT/.convert`; what has a record of the same content is not done again, so a stopped
conversion goes on where it was, and another set of options redoes only what they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from blip2.data.collection import BadSampleError
from blip2.data.convert.duplicates import Decision, decide
from blip2.data.convert.manifest import MANIFEST, first_reason, manifest_of, write_report
from blip2.data.convert.options import READERS, Options
from blip2.data.convert.records import Item, Request, Unit, clean_key
from blip2.data.convert.scan import Look, look_at, pictures_of
from blip2.data.shards.reader import texts_of
from blip2.data.shards.writer import read_record, write_record, write_shard
from blip2.errors import DataError, RunError, os_error_as
from blip2.io.workers import in_processes

_RECORDS = ".convert"


def convert(request: Request, out: Path, options: Options) -> dict[str, Any]:
    """Convert a source to shards in `out`; returns what the manifest says.

    Raises:
        DataError: an annotation file or image is missing or broken, or nothing usable is in it.
        RunError: `out` cannot be written, or processes died again and again.
    """
    units = READERS[options.kind](request)
    if not units:
        raise DataError(f"{request.source}: nothing in it")
    name = clean_key(request.split or options.kind)
    _prepare(out, units, name)
    looks = _look_all(units, out, options)
    decision = decide(looks, evaluation_pictures(options), options)
    if not any(decision.kept(n, look) for n, look in enumerate(looks)):
        raise DataError(f"{request.source}: every sample is bad, the first: {first_reason(looks, decision)}")
    shards = _write_all(units, looks, decision, out, name, options)
    manifest = manifest_of(request, options, looks, decision, shards)
    write_report(out, looks, decision)
    write_record(out / MANIFEST, manifest)
    return manifest


def evaluation_pictures(options: Options) -> dict[str, dict[str, int]]:
    """Hashes by key of every evaluation set."""
    return {spec: pictures_of(spec, options.workers, options.progress) for spec in options.against}


def _prepare(out: Path, units: list[Unit], name: str) -> None:
    """Make the folder; refuse one with shards of others, and remove what a longer conversion left."""
    with os_error_as(RunError, f"{out}: cannot be written"):
        (out / _RECORDS).mkdir(parents=True, exist_ok=True)
        expected = {f"{name}-{number:05d}.tar" for number in range(len(units))}
        for path in sorted(out.glob("*.tar")):
            if path.name not in expected:
                if not _record(out, path.name).is_file():
                    raise DataError(f"{out}: holds {path.name}, which no conversion wrote: choose another folder")
                path.unlink()
                _record(out, path.name).unlink()


def _look_all(units: list[Unit], out: Path, options: Options) -> list[Look]:
    looks: list[Look | None] = []
    prints = [unit.fingerprint() for unit in units]
    for number, fingerprint in enumerate(prints):
        record = read_record(_look_record(out, number))
        looks.append(Look(**record["look"]) if record and record.get("unit") == fingerprint else None)
    todo = [number for number, look in enumerate(looks) if look is None]
    work: Callable[[Unit], Look] = partial(look_at, skip_missing=options.skip_missing)
    done = in_processes(work, [units[n] for n in todo], options.workers, "looking", options.progress)
    for place, look in done:
        looks[todo[place]] = look
        write_record(_look_record(out, todo[place]), {"unit": prints[todo[place]], "look": vars(look)})
    return [look for look in looks if look is not None]


def _write_all(
    units: list[Unit], looks: list[Look], decision: Decision, out: Path, name: str, options: Options
) -> list[dict[str, Any]]:
    """Write the shards that have no record of the same content; returns all records in order."""
    jobs: list[tuple[Unit, Path, set[str], str]] = []
    for number, unit in enumerate(units):
        kept = decision.kept(number, looks[number])
        path = out / f"{name}-{number:05d}.tar"
        plan = f"{unit.fingerprint()}|{len(kept)}|{decision.fingerprint(number)}"
        record = read_record(_record(out, path.name))
        if not (record and record.get("plan") == plan and _whole(path, record)):
            jobs.append((unit, path, set(kept), plan))
    for place, record in in_processes(_write, jobs, options.workers, "writing", options.progress):
        write_record(_record(out, jobs[place][1].name), record)
    records = [read_record(_record(out, f"{name}-{number:05d}.tar")) for number in range(len(units))]
    return [record for record in records if record is not None and record["samples"]]


def _write(job: tuple[Unit, Path, set[str], str]) -> dict[str, Any]:
    """One shard; its record."""
    unit, path, kept, plan = job
    if not kept:
        path.unlink(missing_ok=True)
        return {"plan": plan, "file": path.name, "samples": 0}
    captions = questions = 0

    def samples() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        nonlocal captions, questions
        for item in unit.read():
            if isinstance(item, Item) and item.key in kept:
                texts = texts_of(item.entry)
                captions += len(texts["captions"])
                questions += len(texts["questions"])
                yield item.key, item.read(), _stored(item, texts["captions"])

    try:
        written = write_shard(path, samples())
    except BadSampleError as error:
        raise RunError(f"{path}: an image changed while it was converted ({error.reason}): run it again") from error
    counts = {"samples": len(kept), "captions": captions, "questions": questions}
    return {"plan": plan, "file": path.name, **counts, **vars(written)}


def _stored(item: Item, captions: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a sample: ids and texts first, then whatever the source told."""
    rest = {name: value for name, value in item.entry.items() if name not in ("image_id", "captions", "caption")}
    return {"image_id": str(item.entry.get("image_id", item.key)), "captions": list(captions), **rest}


def _whole(path: Path, record: dict[str, Any]) -> bool:
    if not record["samples"]:
        return not path.exists()
    return path.is_file() and path.stat().st_size == record["bytes"]


def _record(out: Path, shard: str) -> Path:
    return out / _RECORDS / f"{shard}.json"


def _look_record(out: Path, number: int) -> Path:
    return out / _RECORDS / f"look-{number:05d}.json"
