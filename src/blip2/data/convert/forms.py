"""Which form an annotation file has, and which converter reads it: for whoever named another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from blip2.data.convert.rows import as_rows, read_content
from blip2.data.convert.web import is_web_list
from blip2.data.entries import field_name
from blip2.data.image_files import images_below
from blip2.errors import Blip2Error, DataError

_WEB = ("laion", "cc3m", "cc12m", "sbu", "blip")
_CAPTIONS = ("coco", "flickr30k", "nocaps")
_LISTS = ("lavis", "albef", "table")
_ANNOTATIONS = (".json", ".jsonl", ".csv", ".tsv", ".token", ".gz")
_FILES_READ = 8  # of a folder, to find its form


class Form(NamedTuple):
    """A form of annotations.

    Args:
        what: what the file is, for a message.
        kinds: names of `READERS` that read it, the best first; none where no converter does.
        path: where it is.
    """

    what: str
    kinds: tuple[str, ...]
    path: Path


@contextmanager
def naming_the_reader(source: Path, kind: str) -> Iterator[None]:
    """Turn a failure to read `source` as `kind` into a line that says what it is, where another kind reads it.

    Raises:
        DataError: the block's, or the line.
    """
    try:
        yield
    except DataError as error:
        form = form_of(source)
        if form is None or kind in form.kinds:
            raise
        raise DataError(describe(form)) from error


def describe(form: Form) -> str:
    """One line: what the file is, and how it is read."""
    reader = f"read it with --from {form.kinds[0]}" if form.kinds else "no converter reads it"
    return f"{form.path}: {form.what}: {reader}"


def form_of(source: Path) -> Form | None:
    """The form of a file or folder; None where it is not known here or cannot be read."""
    try:
        if source.is_dir():
            return _folder(source)
        return Form(*_file(source), source) if source.is_file() else None
    except (Blip2Error, OSError, ValueError):
        return None


def _folder(folder: Path) -> Form | None:
    """Of several forms the one that the folder is most likely meant for."""
    if any(folder.glob("*.tar")):
        return Form("a folder of tar shards", _WEB, folder)
    if (folder / "SBU_captioned_photo_dataset_urls.txt").is_file():
        return Form("SBU's lists of addresses and captions", ("sbu", *_WEB), folder)
    if any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return Form("a folder of images with a metadata file", ("imagefolder",), folder)
    if any(folder.glob("*.parquet")):
        return Form("a folder of Parquet files", ("table",), folder)
    if any(folder.glob("*_all_questions")):
        return Form("a folder of GQA's questions", ("gqa",), folder)
    images = images_below(folder).paths
    stems = {path.stem for path in images}
    files = [path for place in (folder, folder / "annotations") if place.is_dir() for path in sorted(place.iterdir())]
    files = [path for path in files if path.suffix.lower() in _ANNOTATIONS and path.stem not in stems]
    forms = [form for path in files[:_FILES_READ] if (form := form_of(path)) is not None]
    forms.sort(key=lambda form: not form.kinds)
    if forms:
        return forms[0]
    return Form("a folder of images", ("folder", *_WEB), folder) if images else None


def _file(path: Path) -> tuple[str, tuple[str, ...]]:
    """What a file is and who reads it; DataError or ValueError where that is not known."""
    if path.suffix == ".tar":
        return "a tar shard", _WEB
    with path.open("rb") as handle:
        start = handle.read(4096)
    if b".jpg#" in start.partition(b"\n")[0]:
        return "a token file: an image, # and a number, a tab and a caption a line", ("flickr30k",)
    content = read_content(path)
    if isinstance(content, dict):
        form = _object(content)
        if form is not None:
            return form
    rows = as_rows(path, content)
    names = dict.fromkeys(name for row in rows[:100] for name in row)
    if is_web_list(rows):
        return "a list of addresses and captions", _WEB
    if "regions" in names:
        return "regions of images with phrases", ("vg",)
    if "qas" in names:
        return "questions of Visual Genome by image", ()
    if not field_name(names, "image"):
        raise ValueError("no column of images")
    in_lines = start.lstrip()[:1] == b"{" and (isinstance(content, list) or path.suffix == ".jsonl")
    in_json = not in_lines and start.lstrip()[:1] in (b"{", b"[")
    captions: tuple[str, ...] = ()
    if "conversations" in names:
        return "a list of images with conversations", ("table", "lavis", "albef")
    if field_name(names, "question"):
        what = "images with questions"
    elif field_name(names, "caption"):
        what, captions = "images with captions", _CAPTIONS if "caption" in names else ()
    else:
        raise ValueError("no column of texts")
    if in_json:
        return f"a list of {what}", (*_LISTS, *captions)
    if in_lines:
        return f"JSON lines of {what}", ("jsonl", "imagefolder", "table", "lavis", "albef")
    return f"a table of {what}", ("table", "imagefolder", "lavis", "albef")


def _object(content: dict[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """What a JSON object is, by what it holds."""
    if {"image_urls", "captions"} <= content.keys():
        return "two lists of addresses and captions", ("sbu", *_WEB)
    if "questions" in content:
        return "questions whose answers are kept in a file beside", ("vqav2", "okvqa")
    first = {name: value[0] for name, value in content.items() if isinstance(value, list) and value}
    first = {name: value for name, value in first.items() if isinstance(value, dict)}
    if "images" in first and "sentences" in first["images"]:
        return "Karpathy's split file of images with sentences", ("coco", "flickr30k", "nocaps")
    if "annotations" in first and "question_id" in first["annotations"] and "question" not in first["annotations"]:
        return "answers alone: give the file of their questions, which must lie beside", ()
    if {"images", "annotations"} <= first.keys():
        if "caption" in first["annotations"]:
            return "images and annotations with captions", ("coco", "nocaps", "flickr30k")
        return "annotations without captions or questions", ()
    if content and all(isinstance(value, dict) and "imageId" in value for value in content.values()):
        return "questions by number, with imageId", ("gqa",)
    return None
