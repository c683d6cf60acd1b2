"""Rows out of the files that people keep annotations in: delimited text, JSON, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from blip2.data.collection import BadSampleError
from blip2.data.entries import FIELDS, decode_text, field_name, read_file, text_lines
from blip2.data.image_formats import suffixes
from blip2.errors import ConfigError, DataError

Row = dict[str, Any]
_DELIMITERS = ",;\t|"
ADDRESS = ("http://", "https://")  # that of an image in the web
_PARQUET, _ZIP = b"PAR1", b"PK\x03\x04"
_NOT_WESTERN = re.compile(rb"[\x80-\xff]{4}")  # words of Greek, Russian or Chinese, where "café”" has two such bytes


def read_content(path: Path, columns: Collection[str] = ()) -> Any:
    """What a file holds: a JSON value, or the rows of a table (JSON lines, delimited text, Parquet) as a list.

    Text is UTF-8, UTF-16 or UTF-32, with a BOM or without, or Windows-1252; it may be compressed by gzip. The first
    line of a delimited text names the columns; of `, ; tab |` the delimiter is the one that makes most sense of it.
    CC3M's and CC12M's lists, whose columns have no names, become rows of `url` and `caption`.

    Args:
        columns: names that the header is expected to have, beside those of `FIELDS`.

    Raises:
        DataError: it cannot be read, or is none of these.
        ConfigError: it is Parquet and pyarrow is not installed.
    """
    data = read_file(path)
    if data.startswith(_PARQUET):
        return [row for batch in open_parquet(path).iter_batches() for row in batch.to_pylist()]
    if data.startswith(_ZIP):
        raise DataError(f"{path}: an Excel workbook or another zip archive: save it as CSV")
    text = _decoded(path, data)
    if text.lstrip()[:1] in ("{", "["):
        return _json(path, text)
    if _address_column(text.partition("\n")[0]) is not None:
        return _web_pairs(path, text)
    return _delimited(path, text, columns)


def read_text(path: Path) -> str:
    """The text of a file, in any of the encodings of `read_content`.

    Raises:
        DataError: it cannot be read, or is no text.
    """
    return _decoded(path, read_file(path))


def as_rows(path: Path, content: Any) -> list[Row]:
    """The rows of what a file holds: a list of objects, alone or inside an object, or texts by image.

    Raises:
        DataError: there are none.
    """
    if isinstance(content, dict):
        lists = [value for value in content.values() if _is_rows(value)]
        if field_name(content, "image") and not lists:
            return [content]
        if len(lists) == 1:
            return list(lists[0])
        if not lists and any(Path(name).suffix.lower() in suffixes() for name in content):
            return [
                {**value, "image": name} if isinstance(value, dict) else {"image": name, "captions": value}
                for name, value in content.items()
            ]
    if _is_rows(content):
        return list(content)
    raise DataError(f"{path}: no table: expected a list of objects, an object a line, or columns named on top")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def open_parquet(path: Path) -> Any:
    """A Parquet file, as pyarrow opens it.

    Raises:
        DataError: it is none, or is damaged.
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'blip2[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return text_lines(str(error))[0] if str(error) else type(error).__name__


def _decoded(path: Path, data: bytes) -> str:
    """Decoded text; a code page is assumed where a text is not Unicode and looks Western."""
    odd, even = data[1:1000:2].count(0), data[0:1000:2].count(0)
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not marked and min(odd, even) == 0 and max(odd, even) > len(data[:1000]) // 4:  # ASCII in UTF-16 without a BOM
        data = (codecs.BOM_UTF16_LE if odd else codecs.BOM_UTF16_BE) + data
    try:
        with suppress(BadSampleError):
            text = decode_text(data)
            if "\0" not in text:
                return text
        if b"\0" not in data and not _NOT_WESTERN.search(data):
            return data.decode("cp1252")
    except UnicodeDecodeError:
        pass
    raise DataError(f"{path}: no text in UTF-8, UTF-16 or Windows-1252: save it as UTF-8")


def _json(path: Path, text: str) -> Any:
    """A JSON value, or that of every line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        rows = []
        for number, line in enumerate(text_lines(text), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as line_error:
                if not rows:  # not one line is JSON of its own: it is no file of JSON lines
                    raise DataError(f"{path}: not valid JSON ({error})") from error
                raise DataError(f"{path}: line {number} is not valid JSON ({line_error})") from line_error
        return rows


def _web_pairs(path: Path, text: str) -> list[Row]:
    """Rows of a caption and an address with a tab between, in either order."""
    rows: list[Row] = []
    for number, line in enumerate(text_lines(text), 1):
        column = _address_column(line)
        if column is None:
            raise DataError(f"{path}: line {number} is not a caption and an address with a tab between: {line[:80]!r}")
        parts = line.split("\t")
        rows.append({"url": parts[column], "caption": parts[1 - column]})
    return rows


def _address_column(line: str) -> int | None:
    parts = line.split("\t")
    columns = [column for column, part in enumerate(parts) if part.startswith(ADDRESS)]
    return columns[0] if columns and len(parts) == 2 else None


def _delimited(path: Path, text: str, columns: Collection[str]) -> list[Row]:
    separator = re.match(r"sep=(.)\s*$", text.partition("\n")[0])  # Excel's own first line
    body = text.partition("\n")[2] if separator else text
    delimiter = separator[1] if separator else _delimiter(next(iter(text_lines(body[:100_000])), ""), columns)
    try:
        return _split(path, body, delimiter, csv.QUOTE_MINIMAL)
    except DataError:
        if delimiter != "\t":
            raise
        return _split(path, body, delimiter, csv.QUOTE_NONE)  # most lists with tabs use no quotes to enclose


def _split(path: Path, text: str, delimiter: str, quoting: Literal[0, 3]) -> list[Row]:
    """Rows of a delimited text; empty ones are left out, and what a short one lacks is None."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True)
    names: list[str] = []
    rows: list[Row] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = [name.strip() for name in row]
                continue
            if len(row) > len(names) and any(row[len(names) :]):
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(row)} fields and the header {len(names)}: enclose texts "
                    f"with {delimiter!r} in quotes"
                )
            rows.append(dict(zip(names, [*row, *[None] * (len(names) - len(row))], strict=False)))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} cannot be read ({error})") from error
    return rows


def _delimiter(header: str, columns: Collection[str]) -> str:
    """The delimiter that splits a header into most known names, of equal ones into most fields."""
    known = {name.lower() for names in FIELDS.values() for name in names} | {name.lower() for name in columns}

    def sense(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader([header], delimiter=delimiter), [])
        return sum(name.strip().lower() in known for name in names), len(names)

    return max(_DELIMITERS, key=sense)
