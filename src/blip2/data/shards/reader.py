"""WebDataset shards, indexed once and read in place.

A tar file is a sequence of headers and bytes: reading the headers gives every member's offset, and
samples can then be read in any order. The `webdataset` library streams instead, with a shuffle
buffer that has no state to resume from; an index gives exact shuffles, no overlap between
processes, and resume from a step number alone. Members are grouped as that library does: a key is
the path up to the first dot of its last part.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from blip2.data.collection import BadSample, BadSampleError, Collection, Place, RawSample, printable
from blip2.data.entries import decode_text, image_id_of, parse_json, text_lines, to_sample
from blip2.data.image_formats import FILM_SUFFIXES, suffixes
from blip2.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
_NUMBERED = re.compile(r"(0|[1-9]\d?)\.(\w+)")


@dataclass
class _Members:
    """What a key has in a shard: its first image, its texts, and the extensions of what is neither.

    Args:
        numbered: images `KEY.0.jpg`, `KEY.1.jpg`, ... that belong together.
        film: `KEY.mp4`.
    """

    image: tuple[int, int] | None = None
    numbered: dict[int, tuple[int, int]] = field(default_factory=dict)
    film: tuple[int, int] | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def read_raw(path: Path) -> Iterator[RawSample | BadSample]:
    """Samples of one shard in order with whole JSON objects (`image_id` and `captions` filled in), and the bad ones.

    Raises:
        DataError: it is missing or is no tar file.
    """
    members, truncated = _members(path)
    for key, parts in members.items():
        try:
            yield _raw(key, parts, path)
        except BadSampleError as error:
            yield BadSample(key, str(path), error.reason)
    if truncated:
        yield BadSample(truncated, str(path), "shard is truncated here")


def read_shards(name: str, paths: list[Path]) -> Collection:
    """Index shards in the order given.

    Raises:
        DataError: a shard is missing or is no tar file.
    """
    collection = Collection(name, [])
    for raw in (raw for path in paths for raw in read_raw(path)):
        if isinstance(raw, BadSample):
            collection.bad.append(raw)
            continue
        try:
            collection.samples.append(to_sample(raw))
        except BadSampleError as error:
            collection.bad.append(BadSample(raw.key, raw.path, error.reason))
    return collection


def _members(path: Path) -> tuple[dict[str, _Members], str | None]:
    """Members by key, and where the file is cut: the member it ends within, or what follows the last."""
    members: dict[str, _Members] = {}
    last = ""
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar, path.open("rb") as handle:
            after = 0
            for member in tar:
                last = printable(member.name)
                if member.isreg() and not member.issparse():
                    if member.size < 0 or member.offset_data + member.size > end:
                        return members, last
                    _add(members, last, member, handle)
                after = tar.offset
                # tarfile keeps every header it has read: too much for a large shard.
                tar.members.clear()  # type: ignore[attr-defined]
            if not _closed(handle, after):
                return members, f"after {last}"
    except tarfile.ReadError as error:
        if last:
            return members, f"after {last}"
        raise DataError(f"{path}: not an uncompressed tar shard ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return members, None


def _add(members: dict[str, _Members], name: str, member: tarfile.TarInfo, handle: BinaryIO) -> None:
    key, extension = _split(name)
    if not key or not extension:
        return
    parts = members.setdefault(key, _Members())
    if f".{extension}" in suffixes() and parts.image is None:
        parts.image = (member.offset_data, member.size)
    elif f".{extension}" in FILM_SUFFIXES and parts.film is None:
        parts.film = (member.offset_data, member.size)
    elif (number := _NUMBERED.fullmatch(extension)) and f".{number[2]}" in suffixes():
        parts.numbered[int(number[1])] = (member.offset_data, member.size)
        parts.others.append(extension)
    elif extension in ("json", "txt"):
        handle.seek(member.offset_data)
        parts.texts[extension] = handle.read(member.size)
    else:
        parts.others.append(extension)


def _closed(handle: BinaryIO, offset: int) -> bool:
    """Whether the archive ends there as a whole one does, in a block of zeros.

    `tarfile` takes a header that is cut or broken for the end and says nothing.
    """
    handle.seek(offset)
    return handle.read(_BLOCK) == bytes(_BLOCK)


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case extension; both empty for hidden files and names without extension."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return "", ""
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _no_image(extensions: list[str]) -> str:
    """Why a key has no image; where a name has several dots, with WebDataset's rule."""
    dotted = next((ext for ext in extensions if f".{ext.rpartition('.')[2]}" in suffixes()), None)
    if dotted:
        return f"no image: the extension is .{dotted}, as WebDataset's keys end at a file name's first dot"
    return "no image" + (f", but .{', .'.join(extensions)}" if extensions else "")


def _raw(key: str, parts: _Members, path: Path) -> RawSample:
    images = [parts.numbered[n] for n in range(len(parts.numbered)) if n in parts.numbered]
    if parts.image is not None or parts.film is not None or len(images) < len(parts.numbered):
        images = [place for place in (parts.image or parts.film,) if place is not None]
    if not images:
        raise BadSampleError(_no_image(parts.others))
    (offset, size), *more = images
    if any(length == 0 for _, length in images):
        raise BadSampleError("zero-byte image")
    if not parts.texts:
        raise BadSampleError("no text" + (f", but .{', .'.join(parts.others)}" if parts.others else ""))
    entry = parse_json(parts.texts["json"]) if "json" in parts.texts else {}
    if "captions" not in entry and "caption" not in entry and "txt" in parts.texts:
        entry = {**entry, "captions": text_lines(decode_text(parts.texts["txt"]))}
    if "captions" not in entry and "caption" in entry:
        entry = {**entry, "captions": entry["caption"]}
    return RawSample(
        key,
        {**entry, "image_id": image_id_of(entry, key)},
        str(path),
        offset,
        size,
        more=tuple(Place(str(path), *place) for place in more),
        film=parts.image is None and parts.film is not None,
    )
