"""Files that are whole or not there: written beside their place and renamed."""

from __future__ import annotations

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, beside its place and rename it; its folder must be there.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, "utf-8")
    beside.replace(path)
