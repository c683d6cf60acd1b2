"""CapFilt of one shard: read in batches, written whole, with a record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from blip2.capfilt.choose import WEB, Judged, choose, filtered_entry, pool
from blip2.capfilt.models import Captioner, Ranker
from blip2.capfilt.settings import CapFiltSettings
from blip2.data.collection import BadSampleError, RawSample
from blip2.data.entries import texts_of
from blip2.data.images import decode_image
from blip2.data.shards.reader import read_raw
from blip2.data.shards.writer import read_record, write_record, write_shard
from blip2.errors import RunError

RECORDS = ".capfilt"


@dataclass(frozen=True)
class Job:
    """A shard to read and the folder to write it to, under its own name."""

    source: str
    out: str

    @property
    def target(self) -> Path:
        """The shard that is written."""
        return Path(self.out) / Path(self.source).name

    @property
    def record(self) -> Path:
        """What is told of it when it is whole."""
        return Path(self.out) / RECORDS / f"{self.target.name}.json"


@dataclass(frozen=True)
class _Read:
    """A sample in memory."""

    key: str
    entry: dict[str, Any]
    web: tuple[str, ...]
    data: bytes
    picture: Image.Image


def finished(job: Job, settings: CapFiltSettings) -> dict[str, Any] | None:
    """The record of a shard that is whole and of these settings and this input; None where there is none.

    Raises:
        RunError: it was made with other settings.
    """
    record = read_record(job.record)
    if record is None or not job.target.is_file() or job.target.stat().st_size != record.get("bytes"):
        return None
    before, now = record["settings"], dataclasses.asdict(settings)
    other = next((name for name in now if before.get(name) != now[name]), None)
    if other:
        raise RunError(
            f"{job.target}: was made with {other} = {before.get(other)!r}, not {now[other]!r}: choose another OUT"
        )
    return record if record.get("input_bytes") == Path(job.source).stat().st_size else None


def filter_shard(
    job: Job, settings: CapFiltSettings, captioner: Captioner | None, ranker: Ranker, *, progress: bool = False
) -> dict[str, Any]:
    """Caption, rank and filter one shard; returns its record, and does nothing where it is finished.

    Raises:
        DataError: the shard cannot be read.
        RunError: it cannot be written, or was made with other settings.
    """
    done = finished(job, settings)
    if done is not None:
        return done
    raw = list(read_raw(Path(job.source)))
    entries = [sample for sample in raw if isinstance(sample, RawSample)]
    counts = Counter({"bad": len(raw) - len(entries)})

    def samples() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        with tqdm(total=len(entries), desc=job.target.name, unit="image", leave=False, disable=not progress) as bar:
            for start in range(0, len(entries), settings.batch):
                part = entries[start : start + settings.batch]
                yield from _filtered(_readable(part, counts), settings, captioner, ranker, counts)
                bar.update(len(part))

    written = write_shard(job.target, samples())
    names = ("samples", "web", "synthetic", "rejected", "emptied", "bad")
    record = {
        "file": job.target.name,
        **{name: counts[name] for name in names},
        **vars(written),
        "input_bytes": Path(job.source).stat().st_size,
        "settings": dataclasses.asdict(settings),
    }
    write_record(job.record, record)
    return record


def seed_of(seed: int, keys: list[str]) -> int:
    """Seed of a batch: its keys decide, not what was drawn before."""
    digest = hashlib.blake2b("\0".join([str(seed), *keys]).encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


def _filtered(
    batch: list[_Read],
    settings: CapFiltSettings,
    captioner: Captioner | None,
    ranker: Ranker,
    counts: Counter[str],
) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """The samples of a batch that keep a caption, as they are written."""
    if not batch:
        return
    for one, judged in zip(batch, _judged(batch, settings, captioner, ranker), strict=True):
        kept, rejected = choose(judged, settings.keep, settings.itm_threshold)
        counts["rejected"] += len(rejected)
        if not kept and not one.entry.get("qa"):
            counts["emptied"] += 1
            continue
        web = sum(text.source == WEB for text in kept)
        counts.update({"samples": 1, "web": web, "synthetic": len(kept) - web})
        yield one.key, one.data, filtered_entry(one.entry, kept, rejected)


def _judged(
    batch: list[_Read], settings: CapFiltSettings, captioner: Captioner | None, ranker: Ranker
) -> list[list[Judged]]:
    """Every image's texts with their scores."""
    pictures = [one.picture for one in batch]
    drawn: list[list[str]] = [[] for _ in batch]
    if captioner is not None and settings.samples:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed_of(settings.seed, [one.key for one in batch]))
            drawn = captioner.captions(pictures, settings.samples)
    candidates = [pool(one.web, texts) for one, texts in zip(batch, drawn, strict=True)]
    texts = [[candidate.text for candidate in own] for own in candidates]
    if not any(texts):
        return [[] for _ in batch]
    scores = ranker.scores(pictures, texts)
    itm: list[list[float | None]] = [[None] * len(own) for own in texts]
    if settings.itm_threshold is not None:
        itm = [list(values) for values in ranker.matches(pictures, texts)]
    return [
        [Judged(c.text, c.source, score, match) for c, score, match in zip(own, found, matched, strict=True)]
        for own, found, matched in zip(candidates, scores, itm, strict=True)
    ]


def _readable(entries: list[RawSample], counts: Counter[str]) -> list[_Read]:
    """Samples whose image can be decoded; a sample needs no text of its own here."""
    found: list[_Read] = []
    for one in entries:
        try:
            web = texts_of(one.entry)["captions"]
        except BadSampleError:
            web = ()
        try:
            data = one.read()
            found.append(_Read(one.key, one.entry, web, data, decode_image(data)))
        except BadSampleError:
            counts["bad"] += 1
    return found
