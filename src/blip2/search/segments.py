"""Segments of an index: rows and vectors of up to a few thousand images, which never change.

Shape letters: N images of a segment, Q queries, E contrastive width, M captions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blip2.errors import DataError

Half = npt.NDArray[np.float16]
Ids = npt.NDArray[np.int64]
Stamp = tuple[int, int, int]
FILES = ("rows.jsonl", "rows.u64", "hashes.u8", "vectors.f16", "owners.u32", "captions.f16")
_ENDS = 4096  # bytes of a file's beginning and end that are read at every opening


@dataclass(frozen=True)
class Row:
    """Where an indexed image lies.

    Args:
        path, offset, size: file and bytes; offset 0 and size -1 is a whole file.
        digest: of the image's bytes, in hexadecimal.
        stamp: size and modification time of a whole file; while they stay the file is not read again.
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

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """All of them, one after the other; at least one."""
        return cls(
            [row for batch in batches for row in batch.rows],
            np.concatenate([batch.vectors for batch in batches]),
            np.concatenate([batch.caption_vectors for batch in batches]),
        )


class Seal(NamedTuple):
    """What the files of a segment held when they were written.

    Args:
        ends: digest of their sizes, beginnings and ends; compared at every opening.
        full: digest of every byte; compared by `index stat --check`.
    """

    ends: str
    full: str


class Segment:
    """Rows and vectors of up to `FULL` images, memory-mapped.

    Args:
        seal: of its files, where the manifest has one.

    Raises:
        DataError: a file is gone, of another length than the others say, or not the one that was written.
    """

    def __init__(self, folder: Path, queries: int, width: int, seal: Seal | None = None) -> None:
        self.folder, self.serial, self._seal = folder, int(folder.name), seal
        try:
            self._stamps = [stamp(folder / name) for name in FILES]
            self._starts = np.fromfile(folder / "rows.u64", dtype=np.uint64)
            self.count = len(self._starts) - 1
            self.vectors = _mapped(folder / "vectors.f16", np.float16, (self.count, queries, width))
            _mapped(folder / "hashes.u8", np.uint8, (self.count, 16))  # of the right size
            self.owners = np.fromfile(folder / "owners.u32", dtype=np.uint32)
            self.caption_vectors = _mapped(folder / "captions.f16", np.float16, (len(self.owners), width))
            # Mapped now: a writer may remove the segment while it is searched.
            self._lines = _mapped(folder / "rows.jsonl", np.uint8, (int(self._starts[-1]),))
            if seal is not None and digest_of_ends(folder / name for name in FILES) != seal.ends:
                raise ValueError("a file is not the one that was written")
        except (OSError, ValueError, IndexError) as error:
            what = getattr(error, "strerror", None) or error
            raise DataError(
                f"{folder}: segment is damaged ({what}): put the file back, or delete the index and build it again"
            ) from error

    def unchanged(self) -> bool:
        """Whether its files are those that were opened: a mapped file that was cut must not be read."""
        try:
            return [stamp(self.folder / name) for name in FILES] == self._stamps
        except OSError:
            return False

    def intact(self) -> bool:
        """Whether every byte is as it was written; True where there is no seal to compare with."""
        return self._seal is None or digest_of_all(self.folder / name for name in FILES) == self._seal.full

    def row(self, number: int) -> Row:
        """Where image `number` lies."""
        entry = json.loads(self._lines[int(self._starts[number]) : int(self._starts[number + 1])].tobytes())
        return Row(**{**entry, "stamp": tuple(entry["stamp"]), "captions": tuple(entry["captions"])})

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        return map(self.row, range(self.count))

    def part(self, mask: npt.NDArray[np.bool_]) -> Batch:
        """The images that a mask [N] selects."""
        rows = [self.row(int(number)) for number in np.flatnonzero(mask)]
        return Batch(rows, self.vectors[mask], self.caption_vectors[mask[self.owners]])

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())


def seal_of(folder: Path) -> Seal:
    """The seal of a segment's files as they are."""
    paths = [folder / name for name in FILES]
    return Seal(digest_of_ends(paths), digest_of_all(paths))


def stamp(path: Path) -> Stamp:
    """Inode, size and time of change: they differ where another file has taken the place."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def digest_of_ends(paths: Iterable[Path]) -> str:
    """Digest of files' sizes, beginnings and ends."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            digest.update(size.to_bytes(8, "little") + handle.read(_ENDS))
            handle.seek(max(0, size - _ENDS))
            digest.update(handle.read(_ENDS))
    return digest.hexdigest()


def digest_of_all(paths: Iterable[Path]) -> str:
    """Digest of every byte of files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as handle:
            while part := handle.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def groups(segments: Iterable[Segment], size: Callable[[Segment], int], limit: int) -> Iterator[list[Segment]]:
    """Segments in order, as many together as `limit` allows, and at least one."""
    group: list[Segment] = []
    for segment in segments:
        if group and sum(map(size, group)) + size(segment) > limit:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def image_id(serial: int, number: int) -> int:
    """One number for an image: its segment and its row there."""
    return serial << 32 | number


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A file as an array, copy-on-write: nothing that is done to it reaches the disk."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"{path.name} has {size} bytes instead of {expected}")
    if not expected:
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="c", shape=shape)
