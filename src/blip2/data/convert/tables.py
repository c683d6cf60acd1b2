"""Tables of images and texts: delimited text, JSON, JSON lines, Parquet; a row per image or per pair."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.data.collection import BadSample, BadSampleError, RawSample
from blip2.data.convert.locate import Images, annotation, images_of
from blip2.data.convert.records import Request, Unit, clean_key, merge_by_image, split_into_units
from blip2.data.convert.rows import Row, as_rows, open_parquet, read_content
from blip2.data.entries import FIELDS, answers_of, field_name
from blip2.errors import ConfigError, DataError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_IMAGE_TAG = "<image>"  # stands in LLaVA's texts for where the image is put


def read_table(request: Request) -> list[Unit]:
    """A table in any form of `rows.read_content`, or a folder of .parquet files; rows of one image become one sample.

    Parquet with the images inside is taken part by part and its rows are not joined.

    Raises:
        DataError: it cannot be read, or has no column for the image.
        ConfigError: pyarrow is not installed and the table is Parquet.
    """
    source = request.source
    if source.is_dir():
        paths = sorted(source.glob("*.parquet"))
        if not paths:
            raise DataError(f"{source}: no .parquet file in it; give another table itself")
        return [unit for path in paths for unit in _parquet(path, request)]
    if not source.is_file():
        raise DataError(f"{source}: no such table")
    if source.suffix == ".parquet":
        return _parquet(source, request)
    return _units(source, read_content(source, request.columns.values()), request)


def read_list(request: Request) -> list[Unit]:
    """The lists of LAVIS and ALBEF: objects with `image` and `caption`, or `question` and `answer`."""
    split = request.split or "train"
    path = annotation(request, f"*{split}*.json", "*.json")
    return _units(path, read_content(path), request)


def read_imagefolder(request: Request) -> list[Unit]:
    """A folder of Hugging Face's `imagefolder`: images with `metadata.jsonl` or `.csv` in it or in its splits."""
    split = request.split or "*"
    path = annotation(request, *_METADATA, *(f"{split}/{name}" for name in _METADATA))
    located = Request(path, request.images or path.parent, None, request.size, request.columns)
    return read_table(located)


@dataclass(frozen=True)
class RowGroups:
    """Row groups of a Parquet file whose images lie in it."""

    path: str
    groups: tuple[int, ...]
    columns: tuple[tuple[str, str], ...]

    def fingerprint(self) -> str:
        """Of name, size and place."""
        return f"{os.path.basename(self.path)}|{os.path.getsize(self.path)}|{self.groups}|{self.columns}"

    def read(self) -> Iterator[RawSample | BadSample]:
        """Rows as samples; a row without image is a bad sample."""
        columns = dict(self.columns)
        stem = clean_key(Path(self.path).stem)
        table = open_parquet(Path(self.path))
        for group in self.groups:
            rows = table.read_row_group(group, columns=sorted(set(columns.values()))).to_pylist()
            for number, row in enumerate(rows):
                key = f"{stem}-{group:04d}-{number:06d}"
                data = row[columns["image"]]
                data = data.get("bytes") if isinstance(data, dict) else data
                try:
                    if not isinstance(data, bytes) or not data:
                        raise BadSampleError("no image")
                    yield RawSample(key, _entry(row, columns, key), data=data)
                except BadSampleError as error:
                    yield BadSample(key, self.path, error.reason)


def _parquet(path: Path, request: Request) -> list[Unit]:
    table = open_parquet(path)
    schema = table.schema_arrow
    columns = _columns(path, schema.names, request.columns)
    kind = str(schema.field(columns["image"]).type)
    if kind.startswith(("struct", "binary", "large_binary")):
        named = tuple(sorted(columns.items()))
        group = table.metadata.row_group
        numbers = range(table.metadata.num_row_groups)
        parts = request.size.split(numbers, lambda n: group(n).num_rows, lambda n: group(n).total_byte_size)
        return [RowGroups(str(path), part, named) for part in parts]
    return _units(path, read_content(path), request)


def _units(path: Path, content: Any, request: Request) -> list[Unit]:
    rows = as_rows(path, content)
    columns = _columns(path, dict.fromkeys(name for row in rows for name in row), request.columns)
    images = images_of(request)
    samples = (_sample(path, number, row, columns, images) for number, row in enumerate(rows, 1))
    return split_into_units(merge_by_image(samples), request.size)


def _columns(path: Path, names: Iterable[str], given: dict[str, str]) -> dict[str, str]:
    """Column names by what they hold."""
    present = list(names)
    for what, name in given.items():
        if what not in FIELDS:
            raise ConfigError(f"columns names {what!r}: it must be one of {', '.join(FIELDS)}")
        if name not in present:
            raise DataError(f"{path}: no column {name!r}: there are {', '.join(present)}")
    guessed = {what: field_name(present, what) for what in FIELDS}
    columns = {what: name for what, name in {**guessed, **given}.items() if name}
    if "conversations" in present:
        columns["conversations"] = "conversations"
    if "image" not in columns or not {"caption", "question", "conversations"} & columns.keys():
        lacking = "image" if "image" not in columns else "caption"
        raise DataError(
            f"{path}: which column holds the {lacking}? There are {', '.join(present)}: give --columns {lacking}=NAME"
        )
    return columns


def _sample(path: Path, number: int, row: Row, columns: dict[str, str], images: Images) -> RawSample | BadSample:
    """A row; one that names no image, or has texts of another type, is a bad sample."""
    names = _listed(row.get(columns["image"]))
    name = str(names[0]).strip() if len(names) == 1 else ""
    if not name or isinstance(names[0], dict):
        return BadSample(f"row {number}", str(path), "no image" if len(names) < 2 else "several images")
    stem = clean_key(Path(name.replace("\\", "/")).with_suffix("").as_posix())
    try:
        return RawSample(stem, _entry(row, columns, stem), images.find(name))
    except BadSampleError as error:
        return BadSample(f"row {number}", str(path), error.reason)


def _entry(row: Row, columns: dict[str, str], key: str) -> dict[str, Any]:
    def value(what: str) -> Any:
        return row.get(columns[what]) if what in columns else None

    identity = value("image_id")
    entry: dict[str, Any] = {
        "image_id": key if identity is None else str(identity),
        "captions": _texts(value("caption"), "captions"),
    }
    if value("question") is not None:
        answers = value("answer")
        answers = answers if isinstance(answers, dict) else _texts(answers, "answers")
        question: dict[str, Any] = {
            "question": "".join(_texts(value("question"), "questions")),
            "answers": list(answers_of({"answers": answers, "weight": value("weight")})),
        }
        if isinstance(value("question_id"), int | str):
            question["question_id"] = value("question_id")
        entry["qa"] = [question]
    elif value("conversations") is not None:
        entry["qa"] = _turns(value("conversations"))
    if value("domain") is not None:
        entry["domain"] = str(value("domain"))
    return entry


def _turns(conversation: Any) -> list[dict[str, Any]]:
    """Questions and answers of `[{"from": "human", "value"}, {"from": "gpt", "value"}, ...]`, as LLaVA keeps them."""
    try:
        texts = [turn["value"].replace(_IMAGE_TAG, "").strip() for turn in conversation if turn["from"] != "system"]
    except (TypeError, KeyError, AttributeError):
        raise BadSampleError("conversations are not turns with from and value") from None
    pairs = zip(texts[::2], texts[1::2], strict=False)
    return [{"question": question, "answers": [answer]} for question, answer in pairs]


def _texts(value: Any, what: str) -> list[str]:
    """A text or several; numbers become texts, missing ones are left out, and of an object its `answer` counts."""
    texts = [text.get("answer") if isinstance(text, dict) else text for text in _listed(value)]
    texts = [text for text in texts if text is not None and text == text]  # NaN is pandas' word for missing
    if not all(isinstance(text, str | int | float) for text in texts):
        raise BadSampleError(f"{what} are not strings")
    return [text if isinstance(text, str) else str(text) for text in texts]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
