"""Scanning: which images of a source can be used, and what their perceptual hashes are."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from blip2.data.collection import BadSample, BadSampleError, RawSample, Sample
from blip2.data.convert.records import Unit
from blip2.data.entries import image_id_of, texts_of
from blip2.data.hashes import perceptual_hash
from blip2.data.image_files import images_below
from blip2.data.images import decode_image
from blip2.data.sources import index
from blip2.errors import DataError
from blip2.io.workers import in_processes


@dataclass
class Scan:
    """What a unit holds.

    Args:
        keys, image_ids, hashes: of the usable samples, in order; hashes in hexadecimal.
        bad: (key, reason) of the others.
    """

    keys: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def scan_unit(unit: Unit, *, skip_missing: bool) -> Scan:
    """Read and decode every image of a unit.

    Raises:
        DataError: an image that the annotations name is not there, unless `skip_missing`.
    """
    scan = Scan()
    for sample in unit.read():
        if isinstance(sample, BadSample):
            scan.bad.append((sample.key, sample.reason))
            continue
        try:
            image_hash = _hash(sample, skip_missing)
        except BadSampleError as error:
            scan.bad.append((sample.key, error.reason))
            continue
        scan.keys.append(sample.key)
        scan.image_ids.append(image_id_of(sample.entry, sample.key))
        scan.hashes.append(f"{image_hash:016x}")
    return scan


def hashes_of(spec: str, workers: int, progress: bool) -> dict[str, int]:
    """Hashes by key of a data set's images, with texts or without; what cannot be decoded is left out.

    Raises:
        DataError: no such data set, or no image in it.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir() and not any(folder.glob("*.tar")):
        samples = [Sample(p.relative_to(folder).as_posix(), "", (), str(p)) for p in images_below(folder).paths]
    else:
        samples = index(spec).samples
    if not samples:
        raise DataError(f"{spec}: no image in it to compare with")
    parts = [samples[start : start + 256] for start in range(0, len(samples), 256)]
    hashes: dict[str, int] = {}
    for _, part in in_processes(_hashes, parts, workers, f"hashing {spec}", progress):
        hashes |= part
    return hashes


def _hash(sample: RawSample, skip_missing: bool) -> int:
    """The hash of an image; BadSampleError where it or its texts cannot be used."""
    if sample.data is None and not os.path.exists(sample.path):
        if skip_missing:
            raise BadSampleError("no image")
        raise DataError(
            f"{sample.path}: the image of {sample.key} is missing: give --images DIR, or --skip-missing to go on "
            "without such samples"
        )
    texts_of(sample.entry)
    return perceptual_hash(decode_image(sample.read()))


def _hashes(samples: list[Sample]) -> dict[str, int]:
    hashes: dict[str, int] = {}
    for sample in samples:
        with suppress(BadSampleError):
            hashes[sample.key] = perceptual_hash(decode_image(sample.read()))
    return hashes
