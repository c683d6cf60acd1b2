"""CC3M, CC12M, SBU and LAION: what img2dataset wrote, or the lists of addresses with a folder of images.

Images of the web are lost as time goes by: rows without an image are left out and counted.
"""

from __future__ import annotations

import csv
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from blip2.data.collection import BadSample, RawSample
from blip2.data.convert.folders import read_image_folder
from blip2.data.convert.locate import expecting, images_of, load_json
from blip2.data.convert.records import Request, Unit, clean_key, split_into_units
from blip2.data.entries import text_lines
from blip2.data.shards.reader import read_raw
from blip2.errors import DataError

# What img2dataset keeps for itself.
_INTERNAL = ("key", "status", "error_message", "exif", "caption")


@dataclass(frozen=True)
class Shard:
    """A tar shard of images with texts as one unit."""

    path: str

    def fingerprint(self) -> str:
        """Of name and size."""
        return f"{os.path.basename(self.path)}|{os.path.getsize(self.path)}"

    def read(self) -> Iterator[RawSample | BadSample]:
        """Its samples, with all that their JSON tells."""
        for sample in read_raw(Path(self.path)):
            if isinstance(sample, RawSample):
                entry = {name: value for name, value in sample.entry.items() if name not in _INTERNAL}
                sample = replace(sample, entry=entry)
            yield sample


def read_web(request: Request) -> list[Unit]:
    """img2dataset's shards (one to one) or files, or a list of addresses with `--images`.

    An image belongs to a row when its name is the last part of the address, the CRC-32 of the
    address, or the row's number, which may have leading zeros.

    Raises:
        DataError: nothing there, or not one row has an image.
    """
    source = request.source
    if source.is_dir():
        shards = sorted(source.glob("*.tar"))
        if shards:
            return [Shard(str(path)) for path in shards]
    if source.is_file() and source.suffix == ".tar":
        return [Shard(str(source))]
    if source.is_file() or (source / _SBU[0]).is_file():
        return _from_list(request)
    return read_image_folder(request)


_SBU = ("SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt")


def _from_list(request: Request) -> list[Unit]:
    source = request.source
    rows = _sbu_texts(source) if source.is_dir() else _rows(source)
    images = images_of(request)
    samples: list[RawSample] = []
    count = 0
    for count, (url, caption) in enumerate(rows, 1):
        path = images.find_stem(*_stems(url, count - 1))
        if path is not None:
            entry = {"image_id": url, "captions": [caption], "url": url}
            samples.append(RawSample(f"{count - 1:09d}-{clean_key(Path(path).stem)}"[:80], entry, path))
    if not samples:
        raise DataError(
            f"{images.root}: no image of the {count} rows of {source}: name them by the last part of the address, its "
            "CRC-32 or the row's number, or download with img2dataset and give its output"
        )
    return split_into_units(samples, request.size)


def _stems(url: str, row: int) -> list[str]:
    last = os.path.splitext(os.path.basename(urlsplit(url).path))[0]
    crc = zlib.crc32(url.encode())
    return [str(crc), *(f"{row:0{digits}d}" for digits in (9, 8, 7, 6, 1)), *([last] if last else [])]


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(address, caption) of CC3M's and CC12M's TSV in either order of columns, or of SBU's JSON."""
    if path.suffix == ".json":
        data = load_json(path)
        with expecting(path, "SBU's list of addresses and captions"):
            yield from zip(data["image_urls"], data["captions"], strict=True)
        return
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            for row in csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE):
                if len(row) != 2 or not any(part.startswith("http") for part in row):
                    raise DataError(f"{path}: a line is not caption and address with a tab between: {str(row)[:80]}")
                first = row[0].startswith("http")
                yield (row[0], row[1]) if first else (row[1], row[0])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a list of addresses ({error})") from error


def _sbu_texts(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        urls, captions = (text_lines((folder / name).read_text("utf-8")) for name in _SBU)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder}: needs both {' and '.join(_SBU)} ({error})") from error
    if len(urls) != len(captions):
        raise DataError(f"{folder}: {len(urls)} addresses but {len(captions)} captions")
    yield from zip(urls, captions, strict=True)
