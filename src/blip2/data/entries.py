"""The JSON object and the texts of a sample as data sets write them, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2.data.collection import BadSampleError, Question, RawSample, Sample
from blip2.errors import DataError, os_error_as


def to_sample(raw: RawSample) -> Sample:
    """A sample with its texts.

    Raises:
        BadSampleError: no caption, or a field of another type.
    """
    image_id = image_id_of(raw.entry, raw.key)
    return Sample(raw.key, image_id, path=raw.path, offset=raw.offset, size=raw.size, **texts_of(raw.entry))


def texts_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The text fields of a sample from a JSON object, checked.

    Raises:
        BadSampleError: no caption, or a field of another type.
    """
    texts = _strings(entry.get("captions", entry.get("caption", ())), "captions")
    _strings(entry.get("answers", entry.get("answer", ())), "answers")
    captions = tuple(text.strip() for text in texts if text.strip())
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
    """UTF-8 text, or BadSampleError."""
    try:
        return data.decode("utf-8-sig")
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


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, with their numbers from 1.

    Raises:
        DataError: it cannot be read.
    """
    with os_error_as(DataError, f"{path}: cannot be read"):
        lines = path.read_bytes().splitlines()
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _question(entry: dict[str, Any]) -> Question | None:
    text, kind = entry.get("question"), entry.get("answer_type", entry.get("type"))
    if not isinstance(text, str):
        raise BadSampleError("question is not a string")
    answers = _strings(entry.get("answers", entry.get("answer", ())), "answers")
    return Question(text.strip(), answers, kind if isinstance(kind, str) else None) if text.strip() else None


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
