"""An index on disk: segments that never change, and one manifest that says which of them count.

    INDEX/manifest.json          replaced atomically: the one file that changes
    INDEX/segments/000001/       vectors.f16 [N, Q, E]  query embeddings
                                 rows.jsonl, rows.u64   where each image lies; where each line begins
                                 hashes.u8 [N, 16]      of the images' bytes
                                 captions.f16 [M, E], owners.u32 [M]   where captions are stored
    INDEX/engine/                what the approximate engine made of the segments

A segment is written beside its place and renamed, then the manifest; what a killed process left is not in
the manifest, and the next writer deletes it. Removing marks rows in the manifest; a file that moved
is removed and added again with its stored vectors. Compaction copies what remains of small segments
and of those that lost many rows.

Shape letters: N images of a segment, Q queries, E contrastive width, M captions.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blip2.errors import DataError, RunError
from blip2.io.atomic import replacing
from blip2.ops.devices import to_list
from blip2.search.segments import Batch, Half, Ids, Row, Seal, Segment, groups, image_id, seal_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
FULL = 4096  # images of a segment: 64 MiB at 32 x 256
_THINNED = 0.3  # share of removed rows from which the rest of a segment is copied
_MANIFEST, _SEGMENTS = "manifest.json", "segments"
_OURS = (_SEGMENTS, ".lock", f".{_MANIFEST}.tmp*")  # what a creation that was killed leaves


@dataclass(frozen=True)
class ModelId:
    """Which model's vectors an index holds; `name` is for people, `fingerprint` decides."""

    name: str
    fingerprint: str
    queries: int
    width: int

    def __str__(self) -> str:
        return f"{self.name} [{self.fingerprint}]"


@dataclass
class Manifest:
    """The state of an index.

    Args:
        serial: of the next segment; never used twice, so an old id never means another image.
        removed: rows of segments that count no longer.
        seals: by segment, digests of its files.
        captions: `data` or `model` where captions are stored.
        engine: the approximate engine's own notes, `name` among them.
    """

    model: ModelId
    engine: dict[str, Any]
    captions: str | None = None
    serial: int = 1
    segments: list[int] = field(default_factory=list)
    removed: dict[int, list[int]] = field(default_factory=dict)
    seals: dict[int, Seal] = field(default_factory=dict)


class Store:
    """An index's files. Opening reads; what changes it goes inside `with store.writing():`.

    Raises:
        DataError: no index there, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for attempt in (1, 2):  # a writer may replace segments between the two reads
            self.manifest = _read_manifest(self.path)
            try:
                self.segments = [self._open(serial) for serial in self.manifest.segments]
                return
            except DataError:
                if attempt == 2 or _read_manifest(self.path).segments == self.manifest.segments:
                    raise

    @classmethod
    def create(cls, path: str | Path, model: ModelId, engine: str, captions: str | None, **settings: Any) -> Store:
        """A new, empty index; `settings` are the engine's.

        Raises:
            DataError: the folder holds something else.
            RunError: it cannot be written.
        """
        path = Path(path)
        if path.exists() and not (path.is_dir() and all(any(map(p.match, _OURS)) for p in path.iterdir())):
            raise DataError(f"{path}: is there already and is no index: choose another --out")
        with writable(path):
            (path / _SEGMENTS).mkdir(parents=True, exist_ok=True)
            _write_manifest(path, Manifest(model, {"name": engine, **settings}, captions))
        return cls(path)

    def current(self) -> Store:
        """This store, or a new one where the index or one of its files has changed since.

        Raises:
            DataError: it is gone or damaged by now.
        """
        same = _read_manifest(self.path) == self.manifest and all(s.unchanged() for s in self.segments)
        return self if same else Store(self.path)

    # -- reading ------------------------------------------------------------------------------

    @cached_property
    def by_serial(self) -> dict[int, Segment]:
        return {segment.serial: segment for segment in self.segments}

    def __len__(self) -> int:
        """Images that count."""
        return sum(s.count - len(self.manifest.removed.get(s.serial, ())) for s in self.segments)

    def live(self, segment: Segment) -> npt.NDArray[np.bool_]:
        """[N], True on rows that count."""
        mask = np.ones(segment.count, dtype=bool)
        mask[self.manifest.removed.get(segment.serial, [])] = False
        return mask

    def by_segment(self, ids: Ids) -> Iterator[tuple[Segment, npt.NDArray[np.bool_], Ids]]:
        """For every segment that holds some of the ids: it, a mask over `ids`, and their rows in it."""
        for serial in to_list(np.unique(ids >> 32)):
            if (segment := self.by_serial.get(serial)) is not None:
                mask = ids >> 32 == serial
                yield segment, mask, ids[mask] & 0xFFFFFFFF

    def living(self, ids: Ids) -> Ids:
        """Those of the ids that still count, in the same order."""
        alive = np.zeros(len(ids), dtype=bool)
        for segment, mask, numbers in self.by_segment(ids):
            alive[mask] = self.live(segment)[numbers]
        return ids[alive]

    def row(self, image: int) -> Row:
        return self.by_serial[image >> 32].row(image & 0xFFFFFFFF)

    def vectors(self, ids: Ids) -> Half:
        """Query embeddings [len(ids), Q, E] of images that count."""
        model = self.manifest.model
        vectors = np.empty((len(ids), model.queries, model.width), dtype=np.float16)
        for segment, mask, numbers in self.by_segment(ids):
            vectors[mask] = segment.vectors[numbers]
        return vectors

    def items(self) -> Iterator[tuple[int, Row]]:
        """(id, row) of every image that counts."""
        for segment in self.segments:
            live = self.live(segment)
            for number, row in enumerate(segment.rows()):
                if live[number]:
                    yield image_id(segment.serial, number), row

    # -- writing ------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the index; reads what was written since it was opened, deletes what a killed writer left.

        Raises:
            RunError: another process is writing, or the folder cannot be written.
        """
        with writable(self.path), (self.path / ".lock").open("w") as handle:
            if fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunError(f"{self.path}: another process is changing this index: try again later") from None
            self._reload(_read_manifest(self.path))
            self._sweep()
            yield

    def change(self, add: Batch | None = None, remove: Sequence[int] = ()) -> None:
        """Add and remove images in one step: both or neither."""
        new = dataclasses.replace(self.manifest, removed=_with_removed(self.manifest.removed, remove))
        if add is not None:
            self._append(new, add)
        self._commit(new)

    def note_engine(self, engine: dict[str, Any]) -> None:
        """Keep the approximate engine's notes."""
        self._commit(dataclasses.replace(self.manifest, engine=engine))

    def compact(self) -> None:
        """Join small segments into full ones and drop removed rows; the index is whole after each step."""
        small = [s for s in self.segments if self._left(s) < max(FULL // 2, (1 - _THINNED) * s.count)]
        for group in groups(small, self._left, FULL):
            self._merge(group)
        self._sweep()

    def _left(self, segment: Segment) -> int:
        """Images of a segment that count."""
        return segment.count - len(self.manifest.removed.get(segment.serial, ()))

    def _merge(self, group: list[Segment]) -> None:
        if len(group) == 1 and self._left(group[0]) == group[0].count:
            return
        serials = {segment.serial for segment in group}
        new = dataclasses.replace(self.manifest, segments=[s for s in self.manifest.segments if s not in serials])
        batch = Batch.joined([segment.part(self.live(segment)) for segment in group])
        if batch.rows:
            self._append(new, batch)
        self._commit(new)

    def _append(self, manifest: Manifest, batch: Batch) -> None:
        """Write a segment, and name it in a manifest that is not committed yet."""
        serial = manifest.serial
        folder = self._folder(serial)
        shutil.rmtree(folder, ignore_errors=True)  # of a writer killed before its manifest
        lines = [json.dumps(dataclasses.asdict(row)).encode() + b"\n" for row in batch.rows]
        owners = np.repeat(np.arange(len(batch.rows)), [len(row.captions) for row in batch.rows])
        files: dict[str, bytes | memoryview] = {
            "rows.jsonl": b"".join(lines),
            "rows.u64": np.cumsum([0, *map(len, lines)]).astype(np.uint64).tobytes(),
            "hashes.u8": b"".join(bytes.fromhex(row.digest) for row in batch.rows),
            "vectors.f16": np.ascontiguousarray(batch.vectors, dtype=np.float16).data,
            "owners.u32": owners.astype(np.uint32).tobytes(),
            "captions.f16": np.ascontiguousarray(batch.caption_vectors, dtype=np.float16).tobytes(),
        }
        with writable(self.path), replacing(folder, sync=True) as temporary:
            temporary.mkdir(parents=True)
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            manifest.seals = {**manifest.seals, serial: seal_of(temporary)}
        manifest.segments, manifest.serial = [*manifest.segments, serial], serial + 1

    def _commit(self, manifest: Manifest) -> None:
        """Write a manifest, without segments of which no image counts, and go on with it."""
        empty = [s.serial for s in self.segments if len(manifest.removed.get(s.serial, ())) == s.count]
        manifest.segments = [s for s in manifest.segments if s not in empty]
        manifest.removed = {s: rows for s, rows in manifest.removed.items() if s in manifest.segments}
        manifest.seals = {s: seal for s, seal in manifest.seals.items() if s in manifest.segments}
        with writable(self.path):
            _write_manifest(self.path, manifest)
        self._reload(manifest)

    def _reload(self, manifest: Manifest) -> None:
        opened = self.by_serial
        self.manifest = manifest
        self.segments = [opened.get(serial) or self._open(serial) for serial in manifest.segments]
        del self.by_serial

    def _folder(self, serial: int) -> Path:
        return self.path / _SEGMENTS / f"{serial:06d}"

    def _open(self, serial: int) -> Segment:
        model = self.manifest.model
        return Segment(self._folder(serial), model.queries, model.width, self.manifest.seals.get(serial))

    def _sweep(self) -> None:
        """Delete what the manifest does not name."""
        for folder in set((self.path / _SEGMENTS).iterdir()) - set(map(self._folder, self.manifest.segments)):
            shutil.rmtree(folder, ignore_errors=True)
        for temporary in self.path.glob(f".{_MANIFEST}.tmp*"):
            temporary.unlink(missing_ok=True)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder without permission into one line."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RunError(
            f"{path}: index cannot be written: {error.strerror or error}; what was there before is whole"
        ) from error


def _with_removed(removed: Mapping[int, list[int]], ids: Sequence[int]) -> dict[int, list[int]]:
    numbers = {serial: set(rows) for serial, rows in removed.items()}
    for image in ids:
        numbers.setdefault(image >> 32, set()).add(image & 0xFFFFFFFF)
    return {serial: sorted(rows) for serial, rows in numbers.items()}


def _read_manifest(path: Path) -> Manifest:
    file = path / _MANIFEST
    try:
        entry = json.loads(file.read_text("utf-8"))
        if entry["format"] != FORMAT:
            raise DataError(f"{path}: index of format {entry['format']}, this blip2 reads {FORMAT}: build it again")
        del entry["format"]
        entry["model"] = ModelId(**entry["model"])
        entry["removed"] = {int(serial): rows for serial, rows in entry["removed"].items()}
        entry["seals"] = {int(serial): Seal(*seal) for serial, seal in entry.get("seals", {}).items()}
        return Manifest(**entry)
    except OSError as error:
        reason = f"{error.strerror}: make one with `blip2 index build FOLDER --out {path}`"
        raise DataError(f"{path}: no index here ({file.name}: {reason})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not an index's manifest: build the index again") from error


def _write_manifest(path: Path, manifest: Manifest) -> None:
    with replacing(path / _MANIFEST, sync=True) as temporary:
        temporary.write_bytes(json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1).encode())
