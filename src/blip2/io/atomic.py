"""Files and folders that are whole or not there: written beside their place and renamed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LONGEST_NAME = 100  # bytes of a name that the one beside it keeps: file systems take 255 in all, encrypted ones 143


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A path beside `path` where the block writes a file or a folder, which is then renamed to `path`.

    When the block fails, what it wrote is removed and `path` is left as it was. The name (`.NAME.tmp-` and 8 hex
    digits, NAME cut where it is long) is new every time, so processes and threads do not meet; a killed process leaves
    it behind.

    Args:
        sync: flush everything to the disk first, so that `path` is whole after a power cut as well.

    Raises:
        OSError: it cannot be renamed: among others because `path` is a folder with something in it.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
    temporary = path.with_name(f".{name}.tmp-{secrets.token_hex(4)}")
    try:
        yield temporary
        if sync:
            for written in (temporary, *temporary.rglob("*")):
                _sync(written)
        temporary.replace(path)
        if sync:
            _sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file whole; its folder must be there."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole, in UTF-8; bytes of file names that are not UTF-8 become question marks."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Replace a file of a JSON value per line whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or one that cannot be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
