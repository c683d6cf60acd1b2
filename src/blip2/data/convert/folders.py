"""Folders of images with texts beside them, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2.data.collection import BadSampleError, RawSample
from blip2.data.convert.locate import Images, images_of
from blip2.data.convert.records import Request, Unit, clean_key, split_into_units
from blip2.data.entries import decode_text, numbered_lines, parse_json, text_lines, with_usual_names
from blip2.data.image_files import find_images, keys_below, text_beside
from blip2.errors import DataError


def read_image_folder(request: Request) -> list[Unit]:
    """Images below a folder with `NAME.json` or `NAME.txt` (a caption per line) beside each.

    Raises:
        DataError: no such folder, or no image in it.
    """
    folder = request.source
    if not folder.is_dir():
        raise DataError(f"{folder}: no such file or folder")
    paths = find_images([str(folder)]).paths
    keys = map(clean_key, keys_below(folder, paths))
    return split_into_units((_with_sidecar(path, key) for path, key in zip(paths, keys, strict=True)), request.size)


def read_json_lines(request: Request) -> list[Unit]:
    """JSON lines: `image` (relative to the file or to --images), `captions`, `qa`, anything else is kept.

    Raises:
        DataError: the file cannot be read, or a line is no object with an image.
    """
    if not request.source.is_file():
        raise DataError(f"{request.source}: no such JSON lines file")
    return split_into_units(_lines(request.source, images_of(request)), request.size)


def _with_sidecar(path: Path, key: str) -> RawSample:
    """An image with its sidecar; a broken one leaves the texts empty, which the scan reports."""
    entry: dict[str, Any] = {}
    structured, plain = text_beside(path, ".json"), text_beside(path)
    try:
        if structured.is_file():
            entry = parse_json(structured.read_bytes())
        if not entry.get("captions", entry.get("caption")) and "qa" not in entry and plain.is_file():
            entry = {**entry, "captions": text_lines(decode_text(plain.read_bytes()))}
    except (BadSampleError, OSError):
        entry = {}
    return RawSample(key, {"image_id": key, **entry}, str(path))


def _lines(path: Path, images: Images) -> Iterator[RawSample]:
    for number, line in numbered_lines(path):
        try:
            entry = with_usual_names(json.loads(line))
            name = entry.pop("image")
            key = clean_key(str(entry.pop("key", f"{number}-{Path(name).stem}")))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: line {number} is no JSON object with an image") from None
        yield RawSample(key, {"image_id": images.find(name), **entry}, images.find(name))
