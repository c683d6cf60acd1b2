"""What a data set is: samples that know where their image lies, and the bad ones with their reasons."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from blip2.errors import DataError

_TAIL = 256  # bytes of an image that tell it from a changed one


class BadSampleError(Exception):
    """A sample that cannot be used; `reason` is short and the same for every sample of its kind."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def printable(name: str) -> str:
    """A file name that can be printed and written: bytes that are not UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out, and why."""

    key: str
    path: str
    reason: str


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Args:
        answers: of one person or several.
        kind: type that the data set gives it (`yes/no`, `number`, ...).
    """

    text: str
    answers: tuple[str, ...] = ()
    kind: str | None = None


@dataclass(frozen=True)
class Place:
    """Where an image or a film lies; see `Sample`."""

    path: str
    offset: int = 0
    size: int = -1


@dataclass(frozen=True)
class Sample:
    """One image with its texts; or several images that belong together, or a film.

    Args:
        image_id: samples of the same image share it.
        questions: asked about it.
        domain: part of the data set that it counts for (NoCaps: `in`, `near`, `out`).
        label: name of its class, where the data set has classes.
        path, offset, size: file and bytes that hold the image; offset 0 and size -1 is a whole file.
        more: the other images of a sample of several, in order.
        film: whether the file is one (an animated GIF is an image otherwise).
    """

    key: str
    image_id: str
    captions: tuple[str, ...]
    path: str
    offset: int = 0
    size: int = -1
    questions: tuple[Question, ...] = ()
    domain: str | None = None
    more: tuple[Place, ...] = ()
    film: bool = False
    label: str | None = None

    def read(self) -> bytes:
        """The image's bytes.

        Raises:
            DataError: a shard is gone: a run must not silently go on without it.
            BadSampleError: an image file is gone, or there are fewer bytes than there were.
        """
        return _read(self.path, self.offset, self.size)

    @property
    def several(self) -> bool:
        """Whether it has, or is drawn as, several images."""
        return self.film or bool(self.more)

    def read_all(self) -> list[bytes]:
        """The bytes of each of its images, or of the film; raises what `read` does."""
        return [self.read(), *(_read(place.path, place.offset, place.size) for place in self.more)]


@dataclass(frozen=True)
class RawSample:
    """One image with all that its source says of it.

    Args:
        entry: JSON object: `image_id`, `captions` or `qa`, and whatever else the source has.
        path, offset, size, more, film: where its image or images lie, as in `Sample`.
        data: the image itself, where it lies in no file of its own.
    """

    key: str
    entry: dict[str, Any]
    path: str = ""
    offset: int = 0
    size: int = -1
    data: bytes | None = None
    more: tuple[Place, ...] = ()
    film: bool = False

    def read(self) -> bytes:
        """The image's bytes; raises what `Sample.read` does."""
        return _read(self.path, self.offset, self.size) if self.data is None else self.data


@dataclass
class Collection:
    """A data set in memory: usable samples in a stable order, and what was bad when it was indexed.

    Args:
        mixture: (number of samples, weight) of each data set that was mixed, in order; empty where
            nothing is mixed.
        note: a line for people about files that were not looked at; empty where there were none.
    """

    name: str
    samples: list[Sample]
    bad: list[BadSample] = field(default_factory=list)
    mixture: tuple[tuple[int, float], ...] = ()
    note: str = ""

    def limited(self, count: int | None) -> Collection:
        """The first `count` samples (of each part of a mixture); all where it is None."""
        if count is None:
            return self
        if not self.mixture:
            return Collection(self.name, self.samples[:count], self.bad, note=self.note)
        starts = itertools.accumulate((size for size, _ in self.mixture), initial=0)
        sizes = [min(size, count) for size, _ in self.mixture]
        samples = [s for start, size in zip(starts, sizes, strict=False) for s in self.samples[start : start + size]]
        mixture = tuple((size, weight) for size, (_, weight) in zip(sizes, self.mixture, strict=True))
        return Collection(self.name, samples, self.bad, mixture, self.note)

    def fingerprint(self) -> str:
        """Changes when an image, a key or the order does: a cache key for what is made from the images.

        Of every image the size and the last bytes count (those of a JPEG depend on all that stands
        before them); paths and times do not, so a copy of a data set has the same fingerprint.
        """
        digest = hashlib.sha256()
        for path, samples in itertools.groupby(self.samples, key=lambda sample: sample.path):
            with contextlib.ExitStack() as stack:
                handle = None
                with contextlib.suppress(OSError):
                    handle = stack.enter_context(open(path, "rb"))
                for sample in samples:
                    digest.update(f"{sample.key}|{sample.size}|".encode("utf-8", "surrogateescape"))
                    digest.update(_tail(handle, sample) if handle else b"gone")
        return digest.hexdigest()[:16]


def _read(path: str, offset: int, size: int) -> bytes:
    in_shard = size >= 0
    try:
        with open(path, "rb") as handle:
            handle.seek(offset)
            data = handle.read(size if in_shard else -1)
    except OSError as error:
        if in_shard:
            raise DataError(f"{path}: shard cannot be read: {error.strerror}") from error
        raise BadSampleError("image file cannot be read") from error
    if in_shard and len(data) < size:
        raise BadSampleError("image is truncated")
    return data


def _tail(handle: BinaryIO, sample: Sample) -> bytes:
    """The last bytes of an image; its length too where it is a whole file."""
    if sample.size < 0:
        length = handle.seek(0, os.SEEK_END)
        handle.seek(max(length - _TAIL, 0))
        return b"%d|%s" % (length, handle.read(_TAIL))
    handle.seek(sample.offset + max(sample.size - _TAIL, 0))
    return handle.read(min(_TAIL, sample.size))
