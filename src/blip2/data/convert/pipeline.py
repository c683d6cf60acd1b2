"""The work of `blip2 data convert`: scan every image, decide which samples stay, write the shards.

Scanning and writing are shared by processes, a unit at a time. Each unit and each shard leaves a
record in `OUT/.convert`; what has a record of the same content is not done again, so a stopped
conversion goes on where it was, and another set of options redoes only what they change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from blip2.data.collection import BadSampleError, RawSample, printable
from blip2.data.convert.duplicates import Decision, decide
from blip2.data.convert.forms import naming_the_reader
from blip2.data.convert.readers import READERS
from blip2.data.convert.records import Options, Request, Unit, clean_key
from blip2.data.convert.scan import Scan, hashes_of, scan_unit
from blip2.data.entries import texts_of
from blip2.data.shards.writer import write_record, write_shard
from blip2.errors import DataError, RunError, os_error_as
from blip2.io.atomic import read_json, write_json_lines
from blip2.io.workers import in_processes

MANIFEST, REPORT = "manifest.json", "left_out.jsonl"
_RECORDS = ".convert"
Reader = Callable[[Request], list[Unit]]


def convert(request: Request, out: Path, options: Options) -> dict[str, Any]:
    """Convert a source to shards in `out`; returns what the manifest says.

    `out` also gets `manifest.json`, and `left_out.jsonl` with a line per bad sample, near-duplicate and leak.

    Raises:
        DataError: an annotation file or image is missing or broken, or nothing usable is in it.
        RunError: `out` cannot be written, or processes died again and again.
    """
    with naming_the_reader(request.source, options.kind):
        units = _read(request, options.kind)
    name = clean_key(request.split or options.kind)
    _prepare(out, units, name)
    with naming_the_reader(request.source, options.kind):
        scans = _scan_all(units, out, options)
        if not any(scan.keys for scan in scans):
            key, reason = next(bad for scan in scans for bad in scan.bad)
            raise DataError(f"{request.source}: every sample is bad, the first: {printable(key)}: {reason}")
    evaluation = {spec: hashes_of(spec, options.workers, options.progress) for spec in options.against}
    decision = decide(scans, evaluation, options.threshold, options.drop_duplicates)
    left_out: list[dict[str, Any]] = [{"key": key, "bad": reason} for scan in scans for key, reason in scan.bad]
    left_out += decision.lines(scans)
    if not any(decision.kept(n, scan) for n, scan in enumerate(scans)):
        raise DataError(f"{request.source}: every sample is left out, the first: {left_out[0]}")
    shards = _write_all(units, scans, decision, out, name, options)
    manifest = _manifest(request, options, scans, decision, shards)
    with os_error_as(RunError, f"{out / REPORT}: cannot be written"):
        write_json_lines(out / REPORT, left_out)
    write_record(out / MANIFEST, manifest)
    return manifest


def _read(request: Request, kind: str) -> list[Unit]:
    module, _, function = READERS[kind].partition(".")
    read: Reader = getattr(import_module(f"blip2.data.convert.{module}"), function)
    units = read(request)
    if not units:
        raise DataError(f"{request.source}: nothing in it")
    return units


def _prepare(out: Path, units: list[Unit], name: str) -> None:
    """Make the folder; refuse one with shards of others, and remove what a longer conversion left."""
    with os_error_as(RunError, f"{out}: cannot be written"):
        (out / _RECORDS).mkdir(parents=True, exist_ok=True)
        expected = {f"{name}-{number:05d}.tar" for number in range(len(units))}
        for path in sorted(out.glob("*.tar")):
            if path.name not in expected:
                if not _shard_record(path).is_file():
                    raise DataError(f"{out}: holds {path.name}, which no conversion wrote: choose another folder")
                path.unlink()
                _shard_record(path).unlink()


def _scan_all(units: list[Unit], out: Path, options: Options) -> list[Scan]:
    """The scan of every unit, from its record where there is one of the same content."""
    scans: list[Scan | None] = []
    fingerprints = [unit.fingerprint() for unit in units]
    paths = [out / _RECORDS / f"look-{number:05d}.json" for number in range(len(units))]
    for path, fingerprint in zip(paths, fingerprints, strict=True):
        record = read_json(path)
        scans.append(Scan(**record["look"]) if record and record.get("unit") == fingerprint else None)
    todo = [number for number, scan in enumerate(scans) if scan is None]
    work: Callable[[Unit], Scan] = partial(scan_unit, skip_missing=options.skip_missing)
    for place, scan in in_processes(work, [units[n] for n in todo], options.workers, "scanning", options.progress):
        scans[todo[place]] = scan
        write_record(paths[todo[place]], {"unit": fingerprints[todo[place]], "look": vars(scan)})
    return [scan for scan in scans if scan is not None]


def _write_all(
    units: list[Unit], scans: list[Scan], decision: Decision, out: Path, name: str, options: Options
) -> list[dict[str, Any]]:
    """Write the shards that have no record of the same content; returns all records in order."""
    jobs: list[tuple[Unit, Path, set[str], str]] = []
    paths = [out / f"{name}-{number:05d}.tar" for number in range(len(units))]
    for number, (unit, path) in enumerate(zip(units, paths, strict=True)):
        keys = decision.kept(number, scans[number])
        plan = f"{unit.fingerprint()}|{len(keys)}|{decision.fingerprint(number)}"
        record = read_json(_shard_record(path))
        if not (record and record.get("plan") == plan and _is_written(path, record)):
            jobs.append((unit, path, set(keys), plan))
    for place, record in in_processes(_write, jobs, options.workers, "writing", options.progress):
        write_record(_shard_record(jobs[place][1]), record)
    records = map(read_json, map(_shard_record, paths))
    return [record for record in records if record is not None and record["samples"]]


def _write(job: tuple[Unit, Path, set[str], str]) -> dict[str, Any]:
    """One shard; its record."""
    unit, path, keys, plan = job
    if not keys:
        path.unlink(missing_ok=True)
        return {"plan": plan, "file": path.name, "samples": 0}
    captions = questions = 0

    def samples() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        nonlocal captions, questions
        for sample in unit.read():
            if isinstance(sample, RawSample) and sample.key in keys:
                texts = texts_of(sample.entry)
                captions += len(texts["captions"])
                questions += len(texts["questions"])
                yield sample.key, sample.read(), _stored(sample, texts["captions"])

    try:
        written = write_shard(path, samples())
    except BadSampleError as error:
        raise RunError(f"{path}: an image changed while it was converted ({error.reason}): run it again") from error
    counts = {"samples": len(keys), "captions": captions, "questions": questions}
    return {"plan": plan, "file": path.name, **counts, **vars(written)}


def _stored(sample: RawSample, captions: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a sample: ids and texts first, then whatever else the source has."""
    entry = sample.entry
    rest = {name: value for name, value in entry.items() if name not in ("image_id", "captions", "caption")}
    return {"image_id": str(entry.get("image_id", sample.key)), "captions": list(captions), **rest}


def _is_written(path: Path, record: dict[str, Any]) -> bool:
    if not record["samples"]:
        return not path.exists()
    return path.is_file() and path.stat().st_size == record["bytes"]


def _shard_record(shard: Path) -> Path:
    return shard.parent / _RECORDS / f"{shard.name}.json"


def _manifest(
    request: Request, options: Options, scans: list[Scan], decision: Decision, shards: list[dict[str, Any]]
) -> dict[str, Any]:
    total = Counter[str]()
    for record in shards:
        total.update({name: record[name] for name in ("samples", "captions", "questions", "bytes")})
    return {
        "format": "webdataset",
        "kind": options.kind,
        "source": request.source.name,
        "split": request.split,
        "licence": options.licence,
        **total,
        "bad": dict(Counter(reason for scan in scans for _, reason in scan.bad).most_common()),
        "near_duplicates": {"found": len(decision.duplicates), "dropped": options.drop_duplicates},
        "leaks": {spec: sum(leak[1] == spec for leak in decision.leaks.values()) for spec in options.against},
        "threshold_bits": options.threshold,
        "shards": [{name: value for name, value in record.items() if name != "plan"} for record in shards],
    }
