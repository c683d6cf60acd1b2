"""Where a data set lies: its annotation file, and its images by name."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2.data.convert.records import Request
from blip2.data.entries import read_file
from blip2.data.image_files import folders_below, image_at
from blip2.data.image_formats import suffixes
from blip2.errors import DataError


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
    """A JSON file, which may be compressed by gzip.

    Raises:
        DataError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


@contextmanager
def expecting(path: Path, what: str) -> Iterator[None]:
    """Turn a missing or misshapen field of an annotation file into one line that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not {what} ({cause})") from error


class Images:
    """Images of a folder by their path or its last part, wherever below the folder they lie.

    Paths may be those of another machine, in Windows's notation too; letter case and the normal form of Unicode, in
    which file systems differ, decide nothing where one file alone can be meant.

    Raises:
        DataError: no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images: give --images DIR")
        self.root = root
        self._names: dict[str, list[Path]] | None = None
        self._stems: dict[str, Path] = {}

    def find(self, name: str) -> str:
        """Path of an image; where there is none, the path at which it was expected.

        Of several files of that name it is the one whose folders agree best; a name without an image's suffix may be
        a file's stem.
        """
        direct = image_at(self.root, name)
        if direct.is_file():
            return str(direct)
        parts = name.replace("\\", "/").split("/")
        candidates = self._index().get(_plain(parts[-1]), [])
        if not candidates and Path(parts[-1]).suffix.lower() not in suffixes():
            candidates = [self._stems[stem] for stem in [parts[-1]] if stem in self._stems]
        return str(max(candidates, key=lambda path: _agreement(path, parts), default=direct))

    def find_stem(self, *stems: str) -> str | None:
        """Path of the first of the stems that an image has; None where no image has one."""
        self._index()
        return next((str(self._stems[stem]) for stem in stems if stem in self._stems), None)

    def _index(self) -> dict[str, list[Path]]:
        if self._names is None:
            self._names = {}
            for folder, files in sorted(folders_below(self.root, Counter())):
                for file in sorted(files):
                    self._names.setdefault(_plain(file), []).append(folder / file)
                    if not file.endswith((".txt", ".json")):
                        self._stems.setdefault(Path(file).stem, folder / file)
        return self._names


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _agreement(path: Path, parts: list[str]) -> tuple[int, bool]:
    """How many of the last parts of two paths are the same, and whether the last is letter by letter."""
    count = 0
    for mine, other in zip(reversed(path.parts), reversed(parts), strict=False):
        if _plain(mine) != _plain(other):
            break
        count += 1
    return count, path.name == parts[-1]


def images_of(request: Request) -> Images:
    """The folder of images that was given, else that of the annotation file (of `annotations/` the one above)."""
    folder = request.source if request.source.is_dir() else request.source.parent
    return Images(request.images or (folder.parent if folder.name == "annotations" else folder))
