"""Image files named or below folders, the names they go by, and the text files beside them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blip2.data.collection import printable
from blip2.data.image_formats import suffixes
from blip2.errors import DataError

# Folders that programs make for copies, thumbnails and what was thrown away; hidden ones are left out as well.
_TOOL_FOLDERS = {
    "@eaDir",
    "__MACOSX",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}
_TEXTS = (".txt", ".json")
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


@dataclass
class ImageFiles:
    """Image files in a stable order, and what else lay in their folders.

    Args:
        ignored: number of files by kind (`.mp4`, `in @eaDir`) that were not looked at; texts and hidden files do
            not count.
    """

    paths: list[Path] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def note(self) -> str:
        """One line that says what was ignored; empty where nothing was."""
        if not self.ignored:
            return ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.ignored.most_common())
        return f"{self.ignored.total()} other files not read: {kinds}"


def images_below(folder: Path) -> ImageFiles:
    """Every image file in a folder and below it, sorted; linked folders are followed, each folder once.

    What lies in hidden folders and in those of tools (`@eaDir`, `__MACOSX`) is counted, not read.
    """
    files = ImageFiles()
    for place, names in folders_below(folder, files.ignored):
        for name in names:
            _sort_in(place / name, files)
    files.paths.sort()
    files.ignored = +files.ignored
    return files


def folders_below(folder: Path, ignored: Counter[str]) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, each once, with the names of their files; `ignored` counts what is left out."""
    seen, links = set[tuple[int, int]](), [folder]

    def count_unreadable(error: OSError) -> None:
        ignored["folder that cannot be read"] += 1

    while links:  # real folders first, so that a link to one of them brings nothing twice
        for place, folders, names in os.walk(links.pop(0), onerror=count_unreadable, followlinks=False):
            number = os.stat(place)
            if (number.st_dev, number.st_ino) in seen:
                folders.clear()
                continue
            seen.add((number.st_dev, number.st_ino))
            inside = Path(place)
            for name in [name for name in folders if name.startswith(".") or name in _TOOL_FOLDERS]:
                folders.remove(name)
                ignored[f"in {name}"] += sum(len(files) for _, _, files in os.walk(inside / name))
            links += sorted(inside / name for name in folders if (inside / name).is_symlink())
            yield inside, names


def _sort_in(path: Path, files: ImageFiles) -> None:
    suffix = path.suffix.lower()
    if path.name.startswith("._") or (suffix not in suffixes() and path.name.startswith(".")):
        return
    if suffix in suffixes():
        if path.is_file():
            files.paths.append(path)
        else:
            files.ignored["broken link" if path.is_symlink() else "special file"] += 1
    elif suffix not in _TEXTS and path.name.lower() not in _SYSTEM_FILES:
        files.ignored[suffix or "without a suffix"] += 1


def find_images(names: Sequence[str]) -> ImageFiles:
    """Image files named, whatever their suffix, and those below named folders, without doubles.

    Raises:
        DataError: a name does not exist, or a folder holds no image.
    """
    paths: dict[Path, None] = {}
    ignored = Counter[str]()
    for name in names:
        path = Path(name)
        if not name:
            raise DataError("an empty name: give an image or a folder (`.` is this one)")
        if path.is_dir():
            inside = images_below(path)
            ignored += inside.ignored
            if not inside.paths:
                raise DataError(f"{name}: no image in this folder{f' ({note})' if (note := inside.note()) else ''}")
            paths |= dict.fromkeys(inside.paths)
        elif path.exists():
            paths[path] = None
        else:
            raise DataError(f"{name}: no such file or folder")
    return ImageFiles(list(paths), ignored)


def keys_below(folder: Path, paths: Sequence[Path]) -> list[str]:
    """A key for each image of a folder: its path without the suffix, with it where two images differ in that alone."""
    below = [path.relative_to(folder) for path in paths]
    count = Counter(path.with_suffix("") for path in below)
    return [printable((path if count[path.with_suffix("")] > 1 else path.with_suffix("")).as_posix()) for path in below]


def image_at(folder: Path, name: str) -> Path:
    """An image of an annotation file by its path from a folder, which may be written as Windows does."""
    path = folder / name
    windows = folder / name.replace("\\", "/")
    return windows if "\\" in name and not os.path.exists(path) and os.path.exists(windows) else path


def text_beside(image: Path, suffix: str = ".txt") -> Path:
    """The text file of an image: `a.jpg.txt` where there is one, else `a.txt`."""
    own = image.with_name(image.name + suffix)
    return own if os.path.exists(own) else image.with_suffix(suffix)  # a name may be too long: Path.exists raises


def text_to_write(image: Path) -> Path:
    """Where to write the text of an image, so that no two images of a folder share it: see `text_beside`."""
    twins = [image.with_suffix(written) for suffix in suffixes() for written in (suffix, suffix.upper())]
    shared = any(twin.name != image.name and os.path.exists(twin) for twin in twins)
    return image.with_name(image.name + ".txt") if shared else text_beside(image)
