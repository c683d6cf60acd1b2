"""From images to an index: list, tell new from known, encode, write segment after segment.

What is indexed already is known by its content: a copy is a duplicate, a file whose old place is
empty has moved and keeps its vectors, a file whose content changed is encoded again.

Shape letters: B images, Q queries, E contrastive width, P patches, C image-encoder channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from blip2.configs import DecodingConfig
from blip2.data import sources
from blip2.data.collection import BadSample, BadSampleError, Collection, Sample, printable
from blip2.data.entries import decode_text, lines_of
from blip2.data.image_files import ImageFiles, find_images, keys_below, text_beside
from blip2.data.image_formats import suffixes
from blip2.data.images import decode_image, plain_view
from blip2.errors import DataError
from blip2.inference import Blip2
from blip2.ops.devices import to_numpy
from blip2.search.engines import Engine
from blip2.search.query import read
from blip2.search.segments import Batch, Half, Row
from blip2.search.store import Store

A = TypeVar("A")
B = TypeVar("B")
_SEGMENT, _SECONDS = 1024, 60.0  # images, or time, after which what is encoded is written


@dataclass
class Report:
    """The result of adding: counts of images, and the bad ones with their reasons."""

    added: int = 0
    unchanged: int = 0
    duplicates: int = 0
    moved: int = 0
    replaced: int = 0
    bad: list[BadSample] = field(default_factory=list)

    def line(self) -> str:
        counts = {**vars(self), "bad": len(self.bad)}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "added")


@dataclass(frozen=True)
class _Read:
    """A file that was read: its row, and its view [3, S, S] where the index may lack it."""

    row: Row
    view: Tensor | None = None
    unchanged: bool = False


def list_samples(names: Sequence[str]) -> Collection:
    """Images of folders, files, shards and named sets; captions are optional.

    Raises:
        DataError: a name does not exist or holds no image.
    """
    samples: list[Sample] = []
    bad: list[BadSample] = []
    ignored = Counter[str]()
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir() and not any(path.glob("*.tar")):
            files = find_images([str(path)])
            samples += map(_file_sample, files.paths, keys_below(path, files.paths))
            ignored += files.ignored
        elif path.suffix.lower() in suffixes() and path.exists():
            samples.append(_file_sample(path, printable(path.stem)))
        else:
            collection = sources.index(name)
            samples += [replace(s, path=os.path.abspath(s.path)) for s in collection.samples]
            bad += collection.bad
    if not samples:
        reason = f", the first: {bad[0].key}: {bad[0].reason}" if bad else ""
        raise DataError(f"{' '.join(names)}: no image that can be indexed{reason}")
    return Collection(" ".join(names), samples, bad, note=ImageFiles(ignored=ignored).note())


def _file_sample(path: Path, key: str) -> Sample:
    captions: tuple[str, ...] = ()
    with contextlib.suppress(OSError, BadSampleError):  # an image needs no caption to be indexed
        captions = lines_of(decode_text(text_beside(path).read_bytes()))["captions"]
    return Sample(key, key, captions, os.path.abspath(path))


class Builder:
    """Adds images to an index.

    Args:
        model: whose vectors the index holds.
    """

    def __init__(self, store: Store, model: Blip2, *, progress: bool = True) -> None:
        self.store, self.model, self.progress = store, model, progress
        self._spec, self.report = model.image_spec, Report()

    def add(self, samples: list[Sample]) -> Report:
        """Add what is new. Killed at any moment, what was written stays and the next run adds the rest."""
        with self.store.writing():
            known = list(self.store.items())
            self._by_digest = {row.digest: (image, row) for image, row in known}
            self._by_place = {row.place: (image, row) for image, row in known}
            self._pending: list[Batch] = []
            self._removed: list[int] = []
            self._count = 0  # images of the pending batches
            written = time.monotonic()
            bar = tqdm(total=len(samples), unit="image", desc="indexing", disable=not self.progress)
            with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                new: list[_Read] = []
                for sample, result in zip(samples, _ahead(pool, self._read, samples), strict=True):
                    bar.update()
                    if isinstance(result, str):
                        self.report.bad.append(BadSample(sample.key, sample.path, result))
                    elif self._is_new(result):
                        # no view: its content was known when it was read, and has been replaced since
                        new.append(replace(result, view=self._view(sample.read())) if result.view is None else result)
                    if len(new) >= self.model.batch:
                        self._encode(new)
                        new = []
                    if self._count >= _SEGMENT or time.monotonic() - written > _SECONDS:
                        self._flush()
                        written = time.monotonic()
                self._encode(new)
                self._flush()
            self.store.compact()
            Engine(self.store).update(self.store, self.progress)
        return self.report

    # -- telling new from known ---------------------------------------------------------------

    def _read(self, sample: Sample) -> _Read | str:
        """A sample's file, or why it cannot be used.

        Runs in threads, which only read what is known; `_is_new` decides later on the state of then.
        """
        try:
            stamp = _stamp(sample)
            _, known = self._by_place.get((sample.path, sample.offset), (-1, None))
            if known is not None and stamp != (0, 0) and known.stamp == stamp:
                return _Read(known, unchanged=True)
            data = sample.read()
            digest = hashlib.sha256(data).hexdigest()[:32]
            row = Row(sample.key, sample.path, digest, sample.offset, sample.size, stamp, sample.captions)
            return _Read(row, None if digest in self._by_digest else self._view(data))
        except BadSampleError as error:
            return error.reason

    def _view(self, data: bytes) -> Tensor:
        return plain_view(decode_image(data), self._spec)

    def _is_new(self, result: _Read) -> bool:
        """Count an image and note what changes; True where it must be encoded."""
        row = result.row
        in_place = self._by_place.get(row.place)
        if result.unchanged or (in_place is not None and in_place[1].digest == row.digest):
            self.report.unchanged += 1
            return False
        if in_place is not None:  # another image under the same name
            self._forget(*in_place)
            self.report.replaced += 1
        image, same = self._by_digest.get(row.digest, (-1, None))
        if same is not None and (image < 0 or _holds(same)):
            self.report.duplicates += 1
            return False
        if same is not None:
            self._forget(image, same)
            segment = self.store.by_serial[image >> 32]
            stored = segment.part(np.arange(segment.count) == image & 0xFFFFFFFF)
            self._append(replace(stored, rows=[replace(row, captions=same.captions)]))
            self.report.moved += 1
        self._by_digest[row.digest] = self._by_place[row.place] = -1, row
        return same is None

    def _forget(self, image: int, row: Row) -> None:
        self._by_digest.pop(row.digest, None)
        self._by_place.pop(row.place, None)
        if image >= 0:
            self._removed.append(image)

    # -- encoding and writing -----------------------------------------------------------------

    def _encode(self, new: list[_Read]) -> None:
        """Vectors, and captions where the index keeps them, of up to a batch of images."""
        if not new:
            return
        model, mode = self.model, self.store.manifest.captions
        features_BPC = model.encode([result.view for result in new if result.view is not None])
        rows = [result.row if mode == "data" else replace(result.row, captions=()) for result in new]
        caption_vectors = np.empty((0, self.store.manifest.model.width), np.float16)
        if mode is not None:
            bare = [n for n, row in enumerate(rows) if not row.captions]
            if bare:
                captions = model.caption_features(features_BPC[bare], None, DecodingConfig())
                for n, own in zip(bare, captions, strict=True):
                    rows[n] = replace(rows[n], captions=tuple(own))
            caption_vectors = _half(model.embed_texts([caption for row in rows for caption in row.captions]))
        self._append(Batch(rows, _half(model.embed_features(features_BPC)), caption_vectors))
        self.report.added += len(rows)

    def _append(self, batch: Batch) -> None:
        self._pending.append(batch)
        self._count += len(batch.rows)

    def _flush(self) -> None:
        if self._pending or self._removed:
            self.store.change(Batch.joined(self._pending) if self._pending else None, self._removed)
        self._pending, self._removed, self._count = [], [], 0


def _half(vectors: Tensor) -> Half:
    return to_numpy(vectors).astype(np.float16)


def exists(row: Row) -> bool:
    """Whether an image's file is still there, and long enough to hold it."""
    try:
        return os.stat(row.path).st_size >= row.offset + max(row.size, 0)
    except (OSError, ValueError):
        return False


def _holds(row: Row) -> bool:
    """Whether an image still lies where it was indexed; read only where size or time differ."""
    try:
        return _stamp(row) == row.stamp != (0, 0) or read(row)[1] == "ok"
    except BadSampleError:
        return False


def _stamp(sample: Sample | Row) -> tuple[int, int]:
    """Size and time of a whole file; shards are read, since their time says nothing of one member."""
    if sample.size >= 0:
        return 0, 0
    try:
        status = os.stat(sample.path)
    except (OSError, ValueError):
        raise BadSampleError("image file cannot be read") from None
    return status.st_size, status.st_mtime_ns


def _ahead(pool: ThreadPoolExecutor, work: Callable[[A], B], items: list[A], depth: int = 64) -> Iterator[B]:
    """Results in order, computed up to `depth` items ahead of their use."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
