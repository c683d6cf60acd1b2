"""The first look at every image: can it be used, and what is its perceptual hash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blip2.data.collection import BadSample, BadSampleError, Sample
from blip2.data.convert.records import Item, Unit
from blip2.data.folders import images_below
from blip2.data.hashes import perceptual_hash
from blip2.data.images import decode_image
from blip2.data.shards.reader import image_id_of, texts_of
from blip2.data.sources import index
from blip2.errors import DataError
from blip2.io.workers import in_processes


@dataclass
class Look:
    """What was found in a unit.

    Args:
        keys, image_ids, hashes: of the usable samples, in order; hashes in hexadecimal.
        bad: (key, reason) of the others.
    """

    keys: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def look_at(unit: Unit, *, skip_missing: bool) -> Look:
    """Read and decode every image of a unit.

    Raises:
        DataError: an image that the annotations name is not there, unless `skip_missing`.
    """
    look = Look()
    for item in unit.read():
        if isinstance(item, BadSample):
            look.bad.append((item.key, item.reason))
            continue
        if item.data is None and not os.path.exists(item.path):
            if not skip_missing:
                raise DataError(
                    f"{item.path}: the image of {item.key} is missing: give --images DIR, or --skip-missing to go on "
                    "without such samples"
                )
            look.bad.append((item.key, "no image"))
            continue
        try:
            hashed = _usable(item)
        except BadSampleError as error:
            look.bad.append((item.key, error.reason))
            continue
        look.keys.append(item.key)
        look.image_ids.append(image_id_of(item.entry, item.key))
        look.hashes.append(f"{hashed:016x}")
    return look


def pictures_of(spec: str, workers: int, progress: bool) -> dict[str, int]:
    """Hashes by key of a data set's images, with texts or without; what cannot be decoded is left out.

    Raises:
        DataError: no such data set, or no image in it.
    """
    folder = Path(spec).expanduser()
    samples: list[Sample] = []
    if folder.is_dir() and not any(folder.glob("*.tar")):
        paths = images_below(folder)
        samples = [Sample(path.relative_to(folder).as_posix(), "", (), str(path)) for path in paths]
    else:
        samples = index(spec).samples
    if not samples:
        raise DataError(f"{spec}: no image in it to compare with")
    parts = [samples[start : start + 256] for start in range(0, len(samples), 256)]
    found: dict[str, int] = {}
    for _, hashes in in_processes(_hashes, parts, workers, f"hashing {spec}", progress):
        found |= hashes
    return found


def _usable(item: Item) -> int:
    """The hash of an item's image; BadSampleError where image or texts cannot be used."""
    texts_of(item.entry)
    return perceptual_hash(decode_image(item.read()))


def _hashes(samples: list[Sample]) -> dict[str, int]:
    return dict(_each_hash(samples))


def _each_hash(samples: list[Sample]) -> Iterator[tuple[str, int]]:
    for sample in samples:
        try:
            yield sample.key, perceptual_hash(decode_image(sample.read()))
        except BadSampleError:
            continue
