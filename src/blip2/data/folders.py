"""Folders of images with sidecar texts, and JSONL files."""

from __future__ import annotations

from pathlib import Path

from blip2.data.collection import BadSample, BadSampleError, Collection, Place, Sample
from blip2.data.entries import (
    decode_text,
    image_id_of,
    image_names,
    lines_of,
    numbered_lines,
    parse_json,
    texts_of,
    with_usual_names,
)
from blip2.data.image_files import image_at, images_below, keys_below, text_beside


def read_folder(folder: Path) -> Collection:
    """Every image below a folder, with the captions in the text file beside it (`text_beside`), one per line."""
    files = images_below(folder)
    collection = Collection(str(folder), [], note=files.note())
    for path, key in zip(files.paths, keys_below(folder, files.paths), strict=True):
        try:
            texts = lines_of(decode_text(_sidecar(text_beside(path))))
            _not_empty(path)
            collection.samples.append(Sample(key, key, path=str(path), **texts))
        except BadSampleError as error:
            collection.bad.append(BadSample(key, str(path), error.reason))
    return collection


def read_jsonl(path: Path) -> Collection:
    """One object per line: `image` (relative to the file), `captions`, `image_id`, `question`, `answers`.

    In place of `image`, `images` is a list of several that belong together, and `video` a film.

    Other usual names are understood (`file_name` and `text`, see `entries.FIELDS`).

    Raises:
        DataError: the file cannot be read.
    """
    collection = Collection(str(path), [])
    for number, line in numbered_lines(path):
        key = f"line {number}"
        try:
            entry = with_usual_names(parse_json(line))
            names = image_names(entry)
            key = str(entry.get("key", f"{number}-{Path(names[0]).stem}"))
            image, *more = (image_at(path.parent, name) for name in names)
            texts = texts_of(entry)
            for file in (image, *more):
                _not_empty(file)
            texts |= {"more": tuple(Place(str(file)) for file in more), "film": "video" in entry}
            collection.samples.append(Sample(key, image_id_of(entry, str(image)), path=str(image), **texts))
        except BadSampleError as error:
            collection.bad.append(BadSample(key, str(path), error.reason))
    return collection


def _sidecar(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadSampleError("no text") from None
    except OSError:
        raise BadSampleError("text cannot be read") from None


def _not_empty(path: Path) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise BadSampleError("no image") from None
    except (OSError, ValueError):  # ValueError: a name with a NUL in it
        raise BadSampleError("image file cannot be read") from None
    if size == 0:
        raise BadSampleError("zero-byte image")
