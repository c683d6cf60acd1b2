"""WebDataset shards, indexed once and read in place.

A tar file is a sequence of headers and bytes: reading the headers gives every member's offset, and
samples can then be read in any order. The `webdataset` library streams instead, with a shuffle
buffer that has no state to resume from; an index gives exact shuffles, no overlap between
processes, and resume from a step number alone. Members are grouped as that library does: a key is
the path up to the first dot of its last part.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from blip2.data.collection import BadSample, BadSampleError, Collection, Question, Sample, printable
from blip2.data.image_formats import SHARD_FORMATS
from blip2.errors import DataError

_IMAGES = tuple(suffix[1:] for kind in SHARD_FORMATS for suffix in kind.suffixes)
_BLOCK = tarfile.BLOCKSIZE


@dataclass
class _Members:
    """What a key has in a shard."""

    image: tuple[int, int] | None = None
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A sample as it stands in a shard: the bytes that hold its image, and its JSON object with all it tells."""

    key: str
    entry: dict[str, Any]
    offset: int
    size: int


def read_entries(path: Path) -> tuple[list[Entry], list[BadSample]]:
    """Samples of one shard in order with whole JSON objects (`image_id` and `captions` filled in), and the bad ones.

    Raises:
        DataError: it is missing or is no tar file.
    """
    entries: list[Entry] = []
    bad: list[BadSample] = []
    members, cut = _members(path)
    for key, parts in members.items():
        try:
            entries.append(_entry(key, parts))
        except BadSampleError as error:
            bad.append(BadSample(key, str(path), error.reason))
    if cut:
        bad.append(BadSample(cut, str(path), "shard is truncated here"))
    return entries, bad


def read_shards(name: str, paths: list[Path]) -> Collection:
    """Index shards in the order given.

    Raises:
        DataError: a shard is missing or is no tar file.
    """
    collection = Collection(name, [])
    for path in paths:
        members, cut = _members(path)
        for key, parts in members.items():
            try:
                collection.samples.append(_sample(key, parts, path))
            except BadSampleError as error:
                collection.bad.append(BadSample(key, str(path), error.reason))
        if cut:
            collection.bad.append(BadSample(cut, str(path), "shard is truncated here"))
    return collection


def texts_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The text fields of a sample from a JSON object, checked.

    Raises:
        BadSampleError: no caption, or a field of another type.
    """
    captions = _strings(entry.get("captions", entry.get("caption", ())), "captions")
    _strings(entry.get("answers", entry.get("answer", ())), "answers")
    kept = tuple(c.strip() for c in captions if c.strip())
    asked = [entry] if entry.get("question") is not None and "qa" not in entry else entry.get("qa", [])
    if not isinstance(asked, list | tuple) or not all(isinstance(q, dict) for q in asked):
        raise BadSampleError("qa is not a list of questions")
    questions = tuple(q for item in asked if (q := _question(item)) is not None)
    if not kept and not questions:
        raise BadSampleError("no caption")
    for text in (*kept, *(t for q in questions for t in (q.text, *q.answers))):
        _require_utf8(text)
    domain = entry.get("domain")
    return {"captions": kept, "questions": questions, "domain": domain if isinstance(domain, str) else None}


def _question(entry: dict[str, Any]) -> Question | None:
    text, kind = entry.get("question"), entry.get("answer_type", entry.get("type"))
    if not isinstance(text, str):
        raise BadSampleError("question is not a string")
    answers = _strings(entry.get("answers", entry.get("answer", ())), "answers")
    return Question(text.strip(), answers, kind if isinstance(kind, str) else None) if text.strip() else None


def _strings(value: Any, what: str) -> tuple[str, ...]:
    """A string or a list of them (VQAv2 keeps each answer as an object)."""
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list | tuple):
        listed = [v.get("answer") if isinstance(v, dict) else v for v in listed]
        if all(isinstance(v, str) for v in listed):
            return tuple(listed)
    raise BadSampleError(f"{what} are not strings")


def image_id_of(entry: dict[str, Any], default: str) -> str:
    """The `image_id` of a JSON object; `default` where there is none or it is null."""
    value = entry.get("image_id")
    return default if value is None else str(value)


def _require_utf8(text: str) -> None:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSampleError("text is not UTF-8") from None


def decode_text(data: bytes) -> str:
    """UTF-8 text, or BadSampleError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSampleError("text is not UTF-8") from None


def lines_of(text: str) -> dict[str, Any]:
    """The captions of a sidecar text: one per line."""
    return texts_of({"captions": text.splitlines()})


def _members(path: Path) -> tuple[dict[str, _Members], str | None]:
    """Members by key, and where the file is cut: the member it ends within, or what follows the last."""
    found: dict[str, _Members] = {}
    last = ""
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar, path.open("rb") as handle:
            after = 0
            for member in tar:
                last = printable(member.name)
                if member.isreg() and not member.issparse():
                    if member.size < 0 or member.offset_data + member.size > end:
                        return found, last
                    _add(found, last, member, handle)
                after = tar.offset
                # tarfile keeps every header it has read: too much for a large shard.
                tar.members.clear()  # type: ignore[attr-defined]
            if not _closed(handle, after):
                return found, f"after {last}"
    except tarfile.ReadError as error:
        if last:
            return found, f"after {last}"
        raise DataError(f"{path}: not an uncompressed tar shard ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found, None


def _add(found: dict[str, _Members], name: str, member: tarfile.TarInfo, handle: BinaryIO) -> None:
    key, extension = _split(name)
    if not key or not extension:
        return
    parts = found.setdefault(key, _Members())
    if extension in _IMAGES and parts.image is None:
        parts.image = (member.offset_data, member.size)
    elif extension in ("json", "txt"):
        handle.seek(member.offset_data)
        parts.texts[extension] = handle.read(member.size)


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


def _sample(key: str, parts: _Members, path: Path) -> Sample:
    found = _entry(key, parts)
    image_id = image_id_of(found.entry, key)
    return Sample(key, image_id, path=str(path), offset=found.offset, size=found.size, **texts_of(found.entry))


def _entry(key: str, parts: _Members) -> Entry:
    if parts.image is None:
        raise BadSampleError("no image")
    offset, size = parts.image
    if size == 0:
        raise BadSampleError("zero-byte image")
    if "json" in parts.texts:
        entry = parse_json(parts.texts["json"])
        if "captions" not in entry and "caption" not in entry and "txt" in parts.texts:
            entry = {**entry, "captions": decode_text(parts.texts["txt"]).splitlines()}
    elif "txt" in parts.texts:
        entry = {"captions": decode_text(parts.texts["txt"]).splitlines()}
    else:
        raise BadSampleError("no text")
    if "captions" not in entry and "caption" in entry:
        entry = {**entry, "captions": entry["caption"]}
    return Entry(key, {**entry, "image_id": image_id_of(entry, key)}, offset, size)


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object, or BadSampleError."""
    try:
        entry = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        raise BadSampleError("JSON is broken") from None
    if not isinstance(entry, dict):
        raise BadSampleError("JSON is not an object")
    return entry
