"""What a conversion is asked for, and the units of work that its readers make and that become shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from blip2.data.collection import BadSample, RawSample
from blip2.data.convert.readers import READERS
from blip2.data.hashes import THRESHOLD
from blip2.errors import ConfigError

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
T = TypeVar("T")
Item = RawSample | BadSample
S = TypeVar("S", bound=Item)


class Unit(Protocol):
    """What becomes one shard; read by one process, more than once."""

    def fingerprint(self) -> str:
        """Changes when what is read changes."""

    def read(self) -> Iterator[RawSample | BadSample]:
        """Samples in a fixed order, and those that cannot be used."""


@dataclass(frozen=True)
class ShardSize:
    """Largest shard: in samples, or in bytes of images; the other is None."""

    samples: int | None = 1000
    bytes: int | None = None

    @staticmethod
    def parse(text: str) -> ShardSize:
        """From `1000` or `500MB`.

        Raises:
            ConfigError: neither.
        """
        match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)?", text.strip().upper())
        if not match or int(match[1]) < 1:
            raise ConfigError(f"shard-size is {text!r}: it must be a number of samples (1000) or a size (500MB)")
        if match[2]:
            return ShardSize(None, int(match[1]) * _SIZES[match[2]])
        return ShardSize(int(match[1]))

    def split(
        self, values: Iterable[T], samples: Callable[[T], int], bytes_of: Callable[[T], int]
    ) -> Iterator[tuple[T, ...]]:
        """Consecutive values that together are no larger than a shard, or one alone that is larger."""
        limit, size_of = (self.samples, samples) if self.samples else (self.bytes or 1, bytes_of)
        part: list[T] = []
        total = 0
        for value in values:
            size = size_of(value)
            if part and total + size > limit:
                yield tuple(part)
                part, total = [], 0
            part.append(value)
            total += size
        if part:
            yield tuple(part)


@dataclass(frozen=True)
class Request:
    """What is to be read.

    Args:
        source: annotation file, or the folder that holds it.
        images: folder of the images; None takes the folder of the annotation file.
        split: part of the data set; None takes all of it.
        columns: names of a table's columns by what they hold (`image`, `caption`, ...).
    """

    source: Path
    images: Path | None = None
    split: str | None = None
    size: ShardSize = field(default_factory=ShardSize)
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How a source is converted.

    Args:
        kind: a name of `READERS`.
        licence: of the data, written into the manifest.
        drop_duplicates: leave out near-duplicates of earlier images; they are reported in any case.
        against: evaluation sets whose images must not be in the result.
        threshold: bits of 64 in which the hashes of copies may differ.
        skip_missing: leave out annotations whose image is not there, instead of stopping.
        workers: processes.
    """

    kind: str
    licence: str | None = None
    drop_duplicates: bool = False
    against: tuple[str, ...] = ()
    threshold: int = THRESHOLD
    skip_missing: bool = False
    workers: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if self.kind not in READERS:
            raise ConfigError(f"from is {self.kind!r}: it must be one of {', '.join(READERS)}")
        if not 0 <= self.threshold <= 16:
            raise ConfigError(f"threshold is {self.threshold}: it must be between 0 and 16 bits")
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}: it must be 1 or more")


@dataclass(frozen=True)
class AnnotatedSamples:
    """A unit of samples that were read from an annotation file."""

    samples: tuple[Item, ...]

    def fingerprint(self) -> str:
        """Of keys, texts and places."""
        digest = hashlib.blake2b(digest_size=16)
        for sample in self.samples:
            if isinstance(sample, BadSample):
                state: list[Any] = [sample.key, sample.path, sample.reason]
            else:
                state = [sample.key, sample.entry, sample.path, sample.offset, sample.size]
            digest.update(json.dumps(state).encode())
        return digest.hexdigest()

    def read(self) -> Iterator[RawSample | BadSample]:
        """The samples."""
        return iter(self.samples)


def split_into_units(samples: Iterable[Item], size: ShardSize) -> list[Unit]:
    """Samples in order as units of at most `size`; keys that repeat get a number."""
    return [AnnotatedSamples(part) for part in size.split(_with_unique_keys(samples), lambda _: 1, _image_bytes)]


def clean_key(name: str) -> str:
    """A key out of a file's name or an id: no dots or slashes, which shards give a meaning."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "_"


def merge_by_image(samples: Iterable[S]) -> list[S]:
    """Samples of one image joined: captions and questions one after the other; the rest is the first's."""
    merged: dict[str, S] = {}
    for number, sample in enumerate(samples):
        if isinstance(sample, BadSample):
            merged[f"bad {number}"] = sample
            continue
        first = merged.setdefault(sample.path, sample)
        if first is not sample and isinstance(first, RawSample):
            for name in ("captions", "qa"):
                if name in sample.entry:
                    first.entry.setdefault(name, []).extend(sample.entry[name])
    return list(merged.values())


def _with_unique_keys(samples: Iterable[Item]) -> Iterator[Item]:
    seen: set[str] = set()
    for sample in samples:
        key, number = sample.key, 1
        while key in seen:
            number += 1
            key = f"{sample.key}-{number}"
        seen.add(key)
        yield replace(sample, key=key)


def _image_bytes(sample: Item) -> int:
    if isinstance(sample, BadSample):
        return 0
    try:
        return sample.size if sample.size >= 0 else os.path.getsize(sample.path)
    except OSError:
        return 0
