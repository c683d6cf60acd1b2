"""What the readers of `blip2 data convert` share: items, and units of work that become shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from blip2.data.collection import BadSample, Sample
from blip2.errors import ConfigError

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Item:
    """One sample of a source.

    Args:
        entry: its JSON object: `image_id`, `captions` or `qa`, and whatever the source tells.
        path, offset, size: where the image lies, as in `Sample`.
        data: the image itself, where it lies in no file of its own.
    """

    key: str
    entry: dict[str, Any]
    path: str = ""
    offset: int = 0
    size: int = -1
    data: bytes | None = None

    def read(self) -> bytes:
        """The image's bytes; raises what `Sample.read` does."""
        if self.data is not None:
            return self.data
        return Sample(self.key, "", (), self.path, self.offset, self.size).read()


class Unit(Protocol):
    """What becomes one shard; read by one process, more than once."""

    def fingerprint(self) -> str:
        """Changes when what is read changes."""

    def read(self) -> Iterator[Item | BadSample]:
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
        found = re.fullmatch(r"(\d+)\s*(KB|MB|GB)?", text.strip().upper())
        if not found or int(found[1]) < 1:
            raise ConfigError(f"shard-size is {text!r}: it must be a number of samples (1000) or a size (500MB)")
        if found[2]:
            return ShardSize(None, int(found[1]) * _SIZES[found[2]])
        return ShardSize(int(found[1]))


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
class Items:
    """A unit of items that were read from an annotation file."""

    items: tuple[Item, ...]

    def fingerprint(self) -> str:
        """Of keys, texts and places."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items:
            digest.update(json.dumps([item.key, item.entry, item.path, item.offset, item.size]).encode())
        return digest.hexdigest()

    def read(self) -> Iterator[Item | BadSample]:
        """The items."""
        return iter(self.items)


def cut(items: Iterable[Item], size: ShardSize) -> list[Unit]:
    """Items in order as units of at most `size`; keys that repeat get a number."""
    units: list[Unit] = []
    part: list[Item] = []
    weight = 0
    limit = size.samples or size.bytes or 1
    for item in _unique_keys(items):
        own = 1 if size.samples else _bytes_of(item)
        if part and weight + own > limit:
            units.append(Items(tuple(part)))
            part, weight = [], 0
        part.append(item)
        weight += own
    return [*units, Items(tuple(part))] if part else units


def clean_key(name: str) -> str:
    """A key out of a file's name or an id: no dots or slashes, which shards give a meaning."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "_"


def grouped(items: Iterable[Item]) -> list[Item]:
    """Items of one image joined: captions and questions one after the other; the rest is the first's."""
    found: dict[str, Item] = {}
    for item in items:
        first = found.setdefault(item.path, item)
        if first is not item:
            for name in ("captions", "qa"):
                if name in item.entry:
                    first.entry.setdefault(name, []).extend(item.entry[name])
    return list(found.values())


def _unique_keys(items: Iterable[Item]) -> Iterator[Item]:
    seen: set[str] = set()
    for item in items:
        key, number = item.key, 1
        while key in seen:
            number += 1
            key = f"{item.key}-{number}"
        seen.add(key)
        yield item if key == item.key else Item(key, item.entry, item.path, item.offset, item.size, item.data)


def _bytes_of(item: Item) -> int:
    if item.data is not None:
        return len(item.data)
    try:
        return item.size if item.size >= 0 else os.path.getsize(item.path)
    except OSError:
        return 0


Reader = Callable[[Request], list[Unit]]
