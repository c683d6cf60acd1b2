"""The JSON object and the texts of a sample as data sets write them, checked."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from blip2.data.collection import BadSampleError, Question, RawSample, Sample
from blip2.errors import DataError, os_error_as

# Names under which public data sets and tables keep a field, in order of preference; case does not matter.
FIELDS = {
    "image": (
        *("image", "image_path", "img_path", "filepath", "file_path", "path", "file_name", "image_name", "filename"),
        *("file", "jpg"),
    ),
    "caption": ("caption", "captions", "text", "title", "sentence", "sentences", "description", "comment", "txt"),
    "question": ("question",),
    "answer": ("answer", "answers", "direct_answers"),
    "weight": ("weight", "weights"),
    "question_id": ("question_id",),
    "image_id": ("image_id", "id", "img_id"),
    "domain": ("domain",),
    "url": ("url", "image_url", "img_url"),
}
_BOMS = (  # UTF-32's begins with UTF-16's
    *((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
_GZIP = b"\x1f\x8b"
_PEOPLE = 10  # who answer a question of VQAv2


def field_name(names: Iterable[str], what: str) -> str:
    """Which of these names of fields means `what`, a key of `FIELDS`; empty where none does."""
    by_case = {name.strip().lower(): name for name in reversed(list(names))}
    return next((by_case[name] for name in FIELDS[what] if name in by_case), "")


def with_usual_names(entry: dict[str, Any]) -> dict[str, Any]:
    """A JSON line whose image and texts are `image` and `captions`, as Hugging Face's `file_name` and `text` become."""
    entry = dict(entry)
    image = field_name(entry, "image")
    if image and entry.get("image") is None:
        entry["image"] = entry.pop(image)
    caption = field_name(entry, "caption")
    if caption and not {"captions", "caption", "qa", "question"} & entry.keys():
        entry["captions"] = entry.pop(caption)
    return entry


def image_names(entry: dict[str, Any]) -> list[str]:
    """The images of a JSON line: of `image`, of the list `images`, or the film of `video`.

    Raises:
        BadSampleError: none of them, or not as texts.
    """
    several = entry.get("images")
    if several is not None and entry.get("image") is None:
        if not isinstance(several, list) or not several or not all(isinstance(name, str) and name for name in several):
            raise BadSampleError("images is not a list of files")
        return several
    name = entry.get("image") if entry.get("video") is None else entry["video"]
    if not isinstance(name, str) or not name:
        raise BadSampleError("no image")
    return [name]


def to_sample(raw: RawSample) -> Sample:
    """A sample with its texts.

    Raises:
        BadSampleError: no caption, or a field of another type.
    """
    image_id = image_id_of(raw.entry, raw.key)
    place: dict[str, Any] = {
        "path": raw.path,
        "offset": raw.offset,
        "size": raw.size,
        "more": raw.more,
        "film": raw.film,
    }
    return Sample(raw.key, image_id, **place, **texts_of(raw.entry))


def texts_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The text fields of a sample from a JSON object, checked.

    Raises:
        BadSampleError: no caption, or a field of another type.
    """
    texts = _strings(entry.get("captions", entry.get("caption", ())), "captions")
    answers_of(entry)
    captions = tuple(clean for text in texts if (clean := _stripped(text)))
    qa = [entry] if entry.get("question") is not None and "qa" not in entry else entry.get("qa", [])
    if not isinstance(qa, list | tuple) or not all(isinstance(item, dict) for item in qa):
        raise BadSampleError("qa is not a list of questions")
    questions = tuple(question for item in qa if (question := _question(item)) is not None)
    fields = {name: value if isinstance(value := entry.get(name), str) else None for name in ("domain", "label")}
    if not captions and not questions and not fields["label"]:
        raise BadSampleError("no caption")
    for text in (*captions, *(text for question in questions for text in (question.text, *question.answers))):
        _require_utf8(text)
    _require_utf8(fields["label"] or "")
    return {"captions": captions, "questions": questions, **fields}


def answers_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """The answers to a question: of `answers` or `answer`, a string, a list, or answers with their weights.

    Weights, given by answer (`{"cat": 0.7, "pet": 0.3}`) or in a list `weight` beside, become shares of ten people.

    Raises:
        BadSampleError: answers are not strings, or weights are no numbers.
    """
    value: Any = entry.get("answers", entry.get("answer", ()))
    weights: Any = entry.get("weights", entry.get("weight"))
    if isinstance(value, dict):
        value, weights = list(value), list(value.values())
    texts = _strings(value, "answers")
    if not isinstance(weights, list | tuple) or not texts:
        return texts
    numbers = [w for w in weights if isinstance(w, int | float) and math.isfinite(w) and w >= 0]
    if len(numbers) != len(texts) or len(numbers) != len(weights) or not sum(numbers):
        raise BadSampleError("weights are not a number for each answer")
    shares = [w * _PEOPLE / sum(numbers) for w in numbers]
    return tuple(text for text, share in zip(texts, shares, strict=True) if share for _ in range(max(1, round(share))))


def image_id_of(entry: dict[str, Any], default: str) -> str:
    """The `image_id` of a JSON object; `default` where there is none or it is null."""
    value = entry.get("image_id")
    return default if value is None else str(value)


def lines_of(text: str) -> dict[str, Any]:
    """The text fields of a sidecar: a caption per line."""
    return texts_of({"captions": text_lines(text)})


def text_lines(text: str) -> list[str]:
    r"""The lines of a file: they end at \n, \r\n or \r alone, where `str.splitlines` also cuts at U+2028 and others."""
    parts = re.split(r"\r\n|\n|\r", text)
    return parts if parts[-1] else parts[:-1]


def decode_text(data: bytes) -> str:
    """UTF-8 text, or what its byte-order mark says; BadSampleError where it is neither."""
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise BadSampleError("text is not UTF-8") from None


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object, or BadSampleError."""
    try:
        entry = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        raise BadSampleError("JSON is broken") from None
    if not isinstance(entry, dict):
        raise BadSampleError("JSON is not an object")
    return entry


def read_file(path: Path) -> bytes:
    """The bytes of a file, decompressed where they are gzip's.

    Raises:
        DataError: it cannot be read.
    """
    with os_error_as(DataError, f"{path}: cannot be read"):
        data = path.read_bytes()
    if not data.startswith(_GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be decompressed ({error})") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, with their numbers from 1.

    Raises:
        DataError: it cannot be read.
    """
    data = read_file(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as PowerShell writes what is piped into a file
        data = data.decode("utf-16", "replace").encode()
    lines = data.splitlines()
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _question(entry: dict[str, Any]) -> Question | None:
    text, kind = entry.get("question"), entry.get("answer_type", entry.get("type"))
    if not isinstance(text, str):
        raise BadSampleError("question is not a string")
    question = Question(_stripped(text), answers_of(entry), kind if isinstance(kind, str) else None)
    return question if question.text else None


def _stripped(text: str) -> str:
    """Without blanks around it and without byte-order marks, which joined files have inside."""
    return text.replace("\ufeff", "").strip()


def _strings(value: Any, what: str) -> tuple[str, ...]:
    """A string or a list of them (VQAv2 keeps each answer as an object)."""
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list | tuple):
        values = [v.get("answer") if isinstance(v, dict) else v for v in values]
        if all(isinstance(v, str) for v in values):
            return tuple(values)
    raise BadSampleError(f"{what} are not strings")


def _require_utf8(text: str) -> None:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSampleError("text is not UTF-8") from None
