"""Segments of an index: rows and vectors of up to a few thousand images, which never change.

Shape letters: N images of a segment, Q queries, E contrastive width, M captions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blip2.errors import DataError

Half = npt.NDArray[np.float16]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """Where an indexed image lies.

    Args:
        path, offset, size: file and bytes; offset 0 and size -1 is a whole file.
        digest: of the image's bytes, in hexadecimal.
        stamp: size and modification time of a whole file, by which one unchanged is known unread.
    """

    key: str
    path: str
    digest: str
    offset: int = 0
    size: int = -1
    stamp: tuple[int, int] = (0, 0)
    captions: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, int]:
        """What no other image can share."""
        return self.path, self.offset


@dataclass
class Batch:
    """Images to be added: `vectors` [N, Q, E]; `caption_vectors` [M, E] in the order of the rows' captions."""

    rows: list[Row]
    vectors: Half
    caption_vectors: Half


class Segment:
    """Rows and vectors of up to `FULL` images, memory-mapped.

    Raises:
        DataError: a file is gone or of another length than the others say.
    """

    def __init__(self, folder: Path, queries: int, width: int) -> None:
        self.folder, self.serial = folder, int(folder.name)
        try:
            self._starts = np.fromfile(folder / "rows.u64", dtype=np.uint64)
            self.count = len(self._starts) - 1
            self.vectors = _mapped(folder / "vectors.f16", np.float16, (self.count, queries, width))
            self.hashes = _mapped(folder / "hashes.u8", np.uint8, (self.count, 16))
            self.owners = np.fromfile(folder / "owners.u32", dtype=np.uint32)
            self.caption_vectors = _mapped(folder / "captions.f16", np.float16, (len(self.owners), width))
            # Mapped, not opened at need: a writer may remove the segment while it is searched.
            self._lines = _mapped(folder / "rows.jsonl", np.uint8, (int(self._starts[-1]),))
        except (OSError, ValueError, IndexError) as error:
            what = getattr(error, "strerror", None) or error
            raise DataError(f"{folder}: segment is damaged ({what}): build the index again") from error

    def row(self, number: int) -> Row:
        """Where image `number` lies."""
        return _row(self._lines[int(self._starts[number]) : int(self._starts[number + 1])].tobytes())

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        return map(self.row, range(self.count))

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())


def image_id(serial: int, number: int) -> int:
    """One number for an image: its segment and its row there."""
    return serial << 32 | number


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A file as an array, copy-on-write: nothing that is done to it reaches the disk."""
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if (size := path.stat().st_size) != wanted:
        raise ValueError(f"{path.name} has {size} bytes instead of {wanted}")
    if not wanted:
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="c", shape=shape)


def _row(line: bytes) -> Row:
    entry = json.loads(line)
    return Row(**{**entry, "stamp": tuple(entry["stamp"]), "captions": tuple(entry["captions"])})
