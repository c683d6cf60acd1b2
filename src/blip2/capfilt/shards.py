"""CapFilt of one shard: read in batches, written whole, with a record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from blip2.capfilt.choose import WEB, Candidate, choose, filtered_entry, pool
from blip2.capfilt.models import Captioner, Ranker
from blip2.capfilt.settings import CapFiltSettings
from blip2.data.collection import BadSampleError, RawSample
from blip2.data.entries import texts_of
from blip2.data.images import decode_image
from blip2.data.shards.reader import read_raw
from blip2.data.shards.writer import write_record, write_shard
from blip2.errors import RunError
from blip2.io.atomic import read_json

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
        """Counts, sizes and settings of the shard, written when it is complete."""
        return Path(self.out) / RECORDS / f"{self.target.name}.json"


def finished(job: Job, settings: CapFiltSettings) -> dict[str, Any] | None:
    """The record of a shard that is complete, of these settings and this input; None where there is none.

    Raises:
        RunError: it was made with other settings.
    """
    record = read_json(job.record)
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
                yield from _filtered(part, settings, captioner, ranker, counts)
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
    samples: list[RawSample],
    settings: CapFiltSettings,
    captioner: Captioner | None,
    ranker: Ranker,
    counts: Counter[str],
) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """The samples of a batch that keep a caption, as they are written."""
    readable: list[tuple[RawSample, bytes, Image.Image]] = []
    for sample in samples:
        try:
            data = sample.read()
            readable.append((sample, data, decode_image(data)))
        except BadSampleError:
            counts["bad"] += 1
    images = [image for _, _, image in readable]
    scored = _scored([sample for sample, _, _ in readable], images, settings, captioner, ranker)
    for (sample, data, _), candidates in zip(readable, scored, strict=True):
        chosen, rejected = choose(candidates, settings.keep, settings.itm_threshold)
        counts["rejected"] += len(rejected)
        if not chosen and not sample.entry.get("qa"):
            counts["emptied"] += 1
            continue
        web = sum(candidate.source == WEB for candidate in chosen)
        counts.update({"samples": 1, "web": web, "synthetic": len(chosen) - web})
        yield sample.key, data, filtered_entry(sample.entry, chosen, rejected)


def _scored(
    samples: list[RawSample],
    images: list[Image.Image],
    settings: CapFiltSettings,
    captioner: Captioner | None,
    ranker: Ranker,
) -> list[list[Candidate]]:
    """Every image's texts with their scores."""
    synthetic: list[list[str]] = [[] for _ in samples]
    if captioner is not None and settings.samples and samples:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed_of(settings.seed, [sample.key for sample in samples]))
            prompts = [settings.prompt_for(sample.entry) for sample in samples]
            synthetic = captioner.captions(images, prompts, settings.samples)
    pools = [pool(_web_texts(sample), texts) for sample, texts in zip(samples, synthetic, strict=True)]
    if not any(pools):
        return pools
    texts = [[candidate.text for candidate in candidates] for candidates in pools]
    scores = ranker.scores(images, texts)
    itm: Sequence[Sequence[float | None]] = [[None] * len(own) for own in texts]
    if settings.itm_threshold is not None:
        itm = ranker.matches(images, texts)
    return [
        [replace(c, score=score, itm=match) for c, score, match in zip(*rows, strict=True)]
        for rows in zip(pools, scores, itm, strict=True)
    ]


def _web_texts(sample: RawSample) -> tuple[str, ...]:
    """The captions that a sample has; it needs none here."""
    try:
        captions: tuple[str, ...] = texts_of(sample.entry)["captions"]
    except BadSampleError:
        return ()
    return captions
