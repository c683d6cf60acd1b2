"""CC3M, CC12M, SBU and LAION: what img2dataset wrote, or the lists of addresses with a folder of images.

Images of the web are lost as time goes by: rows without an image are left out and counted.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from blip2.data.collection import BadSample, RawSample
from blip2.data.convert.folders import read_image_folder
from blip2.data.convert.locate import expecting, images_of
from blip2.data.convert.records import Request, Unit, clean_key, split_into_units
from blip2.data.convert.rows import ADDRESS, read_content, read_text
from blip2.data.entries import field_name, text_lines
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
    try:
        last = os.path.splitext(os.path.basename(urlsplit(url).path))[0]
    except ValueError:  # no address that can be taken apart
        last = ""
    crc = zlib.crc32(url.encode("utf-8", "replace"))
    return [str(crc), *(f"{row:0{digits}d}" for digits in (9, 8, 7, 6, 1)), *([last] if last else [])]


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(address, caption) of a table with such columns (named or not), or of SBU's JSON."""
    content = read_content(path)
    if isinstance(content, dict) and {"image_urls", "captions"} <= content.keys():
        with expecting(path, "two lists of addresses and captions"):
            yield from zip(content["image_urls"], content["captions"], strict=True)
        return
    if not is_web_list(content):
        raise DataError(f"{path}: no list of addresses and captions: expected columns url and caption")
    url, caption = (field_name(content[0], what) for what in ("url", "caption"))
    for number, row in enumerate(content, 1):
        pair = (row.get(url or field_name(row, "image")), row.get(caption))
        if not all(isinstance(text, str) for text in pair):
            raise DataError(f"{path}: row {number} has no address or no caption")
        yield pair


def is_web_list(content: Any) -> bool:
    """Whether the rows of a file name images by their addresses, with captions."""
    row = content[0] if isinstance(content, list) and content else None
    if not isinstance(row, dict) or not field_name(row, "caption"):
        return False
    url = field_name(row, "url")
    return str(row[url] if url else row.get(field_name(row, "image"))).startswith(ADDRESS)


def _sbu_texts(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        urls, captions = (text_lines(read_text(folder / name)) for name in _SBU)
    except DataError as error:
        raise DataError(f"{folder}: needs both {' and '.join(_SBU)} ({error})") from error
    if len(urls) != len(captions):
        raise DataError(f"{folder}: {len(urls)} addresses but {len(captions)} captions")
    yield from zip(urls, captions, strict=True)
