"""Where a data set lies: its annotation file, and its images by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2.data.convert.records import Request
from blip2.errors import DataError, os_error_as


def annotation(request: Request, *names: str) -> Path:
    """The annotation file: the source itself, or the first of the named (patterns) in its folder.

    Raises:
        DataError: there is none.
    """
    source = request.source
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"{source}: no such annotation file or folder")
    for name in names:
        for folder in (source, source / "annotations"):
            matches = sorted(folder.glob(name))
            if matches:
                return matches[0]
    raise DataError(f"{source}: no annotation file in it: expected {' or '.join(names)}; or give the file itself")


def load_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DataError: it cannot be read or is no JSON.
    """
    try:
        with os_error_as(DataError, f"{path}: cannot be read"):
            return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


@contextmanager
def expecting(path: Path, what: str) -> Iterator[None]:
    """Turn a missing or misshapen field of an annotation file into one line that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not {what} ({cause})") from error


class Images:
    """Images of a folder by their name or their name's last part, wherever below it they lie.

    Raises:
        DataError: no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images: give --images DIR")
        self.root = root
        self._names: dict[str, str] | None = None
        self._stems: dict[str, str] = {}

    def find(self, name: str) -> str:
        """Path of an image; where there is none, the path at which it was expected."""
        direct = self.root / name
        if direct.is_file():
            return str(direct)
        return self._index().get(os.path.basename(name), str(direct))

    def find_stem(self, *stems: str) -> str | None:
        """Path of the first of the stems that an image has; None where no image has one."""
        self._index()
        return next((self._stems[stem] for stem in stems if stem in self._stems), None)

    def _index(self) -> dict[str, str]:
        if self._names is None:
            self._names = {}
            for folder, _, files in sorted(os.walk(self.root)):
                for file in sorted(files):
                    self._names.setdefault(file, os.path.join(folder, file))
                    if not file.endswith((".txt", ".json")):
                        self._stems.setdefault(os.path.splitext(file)[0], os.path.join(folder, file))
        return self._names


def images_of(request: Request) -> Images:
    """The folder of images that was given, else that of the annotation file (of `annotations/` the one above)."""
    folder = request.source if request.source.is_dir() else request.source.parent
    return Images(request.images or (folder.parent if folder.name == "annotations" else folder))
