"""CSV, TSV and Parquet: a row per pair, with a path or the image itself in a column."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.data.collection import BadSample, RawSample
from blip2.data.convert.locate import Images, images_of
from blip2.data.convert.records import Request, Unit, clean_key, merge_by_image, split_into_units
from blip2.errors import ConfigError, DataError

# Column names that are understood without being told, in order of preference.
GUESSES = {
    "image": ("image", "image_path", "filepath", "file_path", "path", "file_name", "filename", "file", "jpg"),
    "caption": ("caption", "captions", "text", "title", "TEXT", "sentence", "description", "txt"),
    "question": ("question",),
    "answer": ("answer", "answers"),
    "image_id": ("image_id", "id", "img_id"),
    "domain": ("domain",),
}


def read_table(request: Request) -> list[Unit]:
    """A .csv, .tsv or .parquet file, or a folder of .parquet files; rows of one image become one sample.

    Parquet with the images inside is taken part by part and its rows are not joined.

    Raises:
        DataError: it cannot be read, or has no column for the image.
        ConfigError: pyarrow is not installed and the table is Parquet.
    """
    source = request.source
    if source.is_dir():
        paths = sorted(source.glob("*.parquet"))
        if not paths:
            raise DataError(f"{source}: no .parquet file in it; give a .csv or .tsv file itself")
        return [unit for path in paths for unit in _parquet(path, request)]
    if not source.is_file():
        raise DataError(f"{source}: no such table")
    if source.suffix == ".parquet":
        return _parquet(source, request)
    if source.suffix not in (".csv", ".tsv"):
        raise DataError(f"{source}: not a table: expected .csv, .tsv or .parquet")
    images = images_of(request)
    try:
        with source.open(encoding="utf-8-sig", newline="") as handle:
            rows = csv.DictReader(handle, delimiter="\t" if source.suffix == ".tsv" else ",")
            columns = _columns(source, rows.fieldnames or (), request.columns)
            return split_into_units(merge_by_image(_sample(row, columns, images) for row in rows), request.size)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: cannot be read as a table ({error})") from error


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
        table = _pyarrow().ParquetFile(self.path)
        for group in self.groups:
            rows = table.read_row_group(group, columns=sorted(set(columns.values()))).to_pylist()
            for number, row in enumerate(rows):
                key = f"{stem}-{group:04d}-{number:06d}"
                data = row[columns["image"]]
                data = data.get("bytes") if isinstance(data, dict) else data
                if data:
                    yield RawSample(key, _entry(row, columns, key), data=data)
                else:
                    yield BadSample(key, self.path, "no image")


def _parquet(path: Path, request: Request) -> list[Unit]:
    table = _opened(path)
    schema = table.schema_arrow
    columns = _columns(path, schema.names, request.columns)
    kind = str(schema.field(columns["image"]).type)
    if kind.startswith(("struct", "binary", "large_binary")):
        named = tuple(sorted(columns.items()))
        group = table.metadata.row_group
        numbers = range(table.metadata.num_row_groups)
        parts = request.size.split(numbers, lambda n: group(n).num_rows, lambda n: group(n).total_byte_size)
        return [RowGroups(str(path), part, named) for part in parts]
    images = images_of(request)
    rows = (row for batch in table.iter_batches(columns=sorted(set(columns.values()))) for row in batch.to_pylist())
    return split_into_units(merge_by_image(_sample(row, columns, images) for row in rows), request.size)


def _columns(path: Path, names: Iterable[str], given: dict[str, str]) -> dict[str, str]:
    """Column names by what they hold."""
    present = list(names)
    for what, name in given.items():
        if what not in GUESSES:
            raise ConfigError(f"columns names {what!r}: it must be one of {', '.join(GUESSES)}")
        if name not in present:
            raise DataError(f"{path}: no column {name!r}: there are {', '.join(present)}")
    guessed = {what: next((n for n in guesses if n in present), "") for what, guesses in GUESSES.items()}
    columns = {what: name for what, name in {**guessed, **given}.items() if name}
    if "image" not in columns or not {"caption", "question"} & columns.keys():
        lacking = "image" if "image" not in columns else "caption"
        raise DataError(
            f"{path}: which column holds the {lacking}? There are {', '.join(present)}: give --columns {lacking}=NAME"
        )
    return columns


def _sample(row: dict[str, Any], columns: dict[str, str], images: Images) -> RawSample:
    name = str(row[columns["image"]])
    stem = clean_key(Path(name).with_suffix("").as_posix())
    return RawSample(stem, _entry(row, columns, stem), images.find(name))


def _entry(row: dict[str, Any], columns: dict[str, str], key: str) -> dict[str, Any]:
    def value(what: str) -> Any:
        return row.get(columns[what]) if what in columns else None

    identity = value("image_id")
    entry: dict[str, Any] = {
        "image_id": key if identity is None else str(identity),
        "captions": _listed(value("caption")),
    }
    if value("question") is not None:
        entry["qa"] = [{"question": value("question"), "answers": _listed(value("answer"))}]
    if value("domain") is not None:
        entry["domain"] = value("domain")
    return entry


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _opened(path: Path) -> Any:
    try:
        return _pyarrow().ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from error


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'blip2[parquet]'") from None
    return pyarrow.parquet
