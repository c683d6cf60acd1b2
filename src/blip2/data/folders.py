"""Folders of images with sidecar texts, and JSONL files."""

from __future__ import annotations

from pathlib import Path

from blip2.data.collection import BadSample, BadSampleError, Collection, Sample, printable
from blip2.data.entries import decode_text, image_id_of, lines_of, numbered_lines, parse_json, texts_of
from blip2.data.image_formats import SUFFIXES
from blip2.errors import DataError


def images_below(folder: Path) -> list[Path]:
    """Every image file in a folder and below it, in a stable order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_folder(folder: Path) -> Collection:
    """Every image below a folder, with the captions in the `.txt` of its name, one per line."""
    collection = Collection(str(folder), [])
    for path in images_below(folder):
        key = printable(path.relative_to(folder).with_suffix("").as_posix())
        try:
            texts = lines_of(decode_text(_sidecar(path.with_suffix(".txt"))))
            _not_empty(path)
            collection.samples.append(Sample(key, key, path=str(path), **texts))
        except BadSampleError as error:
            collection.bad.append(BadSample(key, str(path), error.reason))
    return collection


def read_jsonl(path: Path) -> Collection:
    """One object per line: `image` (relative to the file), `captions`, `image_id`, `question`, `answers`.

    Raises:
        DataError: the file cannot be read.
    """
    collection = Collection(str(path), [])
    for number, line in numbered_lines(path):
        key = f"line {number}"
        try:
            entry = parse_json(line)
            if not isinstance(entry.get("image"), str):
                raise BadSampleError("no image")
            key = str(entry.get("key", f"{number}-{Path(entry['image']).stem}"))
            image = path.parent / entry["image"]
            texts = texts_of(entry)
            _not_empty(image)
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


def find_images(names: list[str]) -> list[str]:
    """Image files named, and those below named folders, in a stable order and without doubles.

    Raises:
        DataError: a name does not exist, or a folder holds no image.
    """
    paths: dict[str, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = images_below(path)
            if not inside:
                raise DataError(f"{name}: no image in this folder ({', '.join(sorted(SUFFIXES))})")
            paths |= dict.fromkeys(map(str, inside))
        elif path.exists():
            paths[name] = None
        else:
            raise DataError(f"{name}: no such file or folder")
    return list(paths)
