"""Engines that find candidates without reading every vector.

An engine covers segments; `candidates` names images of those that are probably among the best, and
the caller scores them exactly from the stored vectors. Segments that are not covered are read whole.
What an engine makes lies in INDEX/engine and is written beside and renamed; the manifest says what of
it counts.

    exact      nothing: every vector is read
    faiss      IVF with codes of a byte per number, memory-mapped; below `exact_below` images nothing
    lancedb    a LanceDB table, on disk or in an object store

Shape letters: Q queries, E contrastive width, M vectors of the query, R rows (query vectors).
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from blip2.errors import ConfigError, DataError
from blip2.io.atomic import replacing
from blip2.search.segments import Ids, Segment, Stamp, ends_of, image_id, stamp
from blip2.search.store import Store, writable

Float = npt.NDArray[np.float32]

ENGINES = ("faiss", "exact", "lancedb")
EXACT_BELOW = 20_000  # images up to which reading every vector is fast enough
_SHARD = 250_000  # images of one IVF file: 2.1 GB of memory while it is made, at 32 x 256
MISSING = "FAISS is not installed (pip install faiss-cpu)"
_SHARDS = 8  # files above which all are made anew


class Engine(Protocol):
    """What the search needs of an engine."""

    def covered(self) -> set[int]:
        """Serials of the segments whose images `candidates` knows."""

    def candidates(self, query_ME: Float, count: int) -> Ids:
        """Distinct images, `count` or more where there are so many; some may be gone from the index."""

    def unchanged(self) -> bool:
        """Whether the files that it has open are still those."""

    def update(self, store: Store, progress: bool) -> None:
        """Cover what deserves it, forget what is gone, note both in the manifest; under `store.writing()`."""


def open_engine(store: Store) -> Engine:
    """The engine that an index was built with.

    Raises:
        ConfigError: its package is not installed.
    """
    name = store.manifest.engine["name"]
    engines: dict[str, Callable[[Store], Engine]] = {"faiss": FaissEngine, "exact": ExactEngine, "lancedb": _lance}
    return engines[name](store)


def require_engine(name: str) -> None:
    """Refuse an engine whose package is missing, before anything is encoded.

    FAISS may be missing: small indexes do without it, large ones are slower.
    """
    if name == "lancedb":
        from blip2.search.lance import import_lancedb

        import_lancedb()


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


def _lance(store: Store) -> Engine:
    from blip2.search.lance import LanceEngine

    return LanceEngine(store)


class ExactEngine:
    """No engine: covers nothing."""

    def __init__(self, store: Store) -> None:
        pass

    def covered(self) -> set[int]:
        return set()

    def candidates(self, query_ME: Float, count: int) -> Ids:
        return np.empty(0, np.int64)

    def unchanged(self) -> bool:
        return True

    def update(self, store: Store, progress: bool) -> None:
        pass


class FaissEngine:
    """IVF over query vectors as rows, in memory-mapped files that share one training.

    Notes in the manifest: `trained` (file), `trained_on` (images), `nprobe`, `shards`, each with its
    `file` and its `segments`, and `seals`: by file, the digest of its ends.
    """

    def __init__(self, store: Store) -> None:
        self.folder, self.notes = store.path / "engine", store.manifest.engine
        self._files: dict[str, Any] = {}
        self._stamps: dict[str, Stamp] = {}

    def covered(self) -> set[int]:
        if not has_faiss():  # what it made cannot be read: every vector is
            return set()
        return {serial for shard in self.notes.get("shards", ()) for serial in shard["segments"]}

    def candidates(self, query_ME: Float, count: int) -> Ids:
        """Over-fetches rows until enough distinct images are among them; the best by their codes."""
        query_ME = np.ascontiguousarray(query_ME, dtype=np.float32)
        rows, before = (8 if len(query_ME) == 1 else 2) * count, -1
        while True:
            found = [self._open(shard["file"]).search(query_ME, rows) for shard in self.notes["shards"]]
            ids_MR = np.concatenate([ids for _, ids in found], axis=1)
            distinct, coded = _by_image(np.concatenate([scores for scores, _ in found], axis=1), ids_MR)
            if len(distinct) >= count or len(distinct) == before:
                best: Ids = distinct[np.argsort(-coded, kind="stable")[: 4 * count]]
                return best
            rows, before = 4 * rows, len(distinct)

    def unchanged(self) -> bool:
        try:
            return all(stamp(self.folder / name) == before for name, before in self._stamps.items())
        except OSError:
            return False

    def _open(self, name: str) -> Any:
        if name not in self._files:
            faiss = _faiss()
            flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
            try:
                before = stamp(self.folder / name)
                if not self._is_ours(name):
                    raise OSError("it is not the file that was written")
                index = faiss.read_index(str(self.folder / name), flags)
            except (RuntimeError, OSError) as error:
                raise DataError(
                    f"{self.folder / name}: FAISS cannot read it: search again if the index is being changed, else "
                    "delete the folder `engine` and run `blip2 index add` on what it holds"
                ) from error
            index.nprobe = self.notes["nprobe"]
            # its threads read ahead after a search has ended: a file that is cut meanwhile would end the process
            faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
            self._files[name], self._stamps[name] = index, before
        return self._files[name]

    def _is_ours(self, name: str) -> bool:
        """Whether a file is there and the one that was written, as far as its ends tell."""
        try:
            found = ends_of([self.folder / name])
        except OSError:
            return False
        return found == self.notes.get("seals", {}).get(name, found)

    # -- writing ------------------------------------------------------------------------------

    def update(self, store: Store, progress: bool) -> None:
        self.notes = dict(store.manifest.engine)
        if len(store) < self.notes.get("exact_below", EXACT_BELOW):
            self._note(store, {k: v for k, v in self.notes.items() if k in ("name", "exact_below")})
            return
        if not has_faiss():
            tqdm.write(f"{store.path}: {MISSING}; every search reads every vector until then", file=sys.stderr)
            return
        if not self._is_ours(self.notes.get("trained", "")):
            self.notes = {k: v for k, v in self.notes.items() if k in ("name", "exact_below")}
        shards = [s for s in self.notes.get("shards", ()) if self._is_ours(s["file"]) and _fresh(s, store)]
        if len(shards) > _SHARDS:
            shards = []
        have = {serial for shard in shards for serial in shard["segments"]}
        bare = [segment for segment in store.segments if segment.serial not in have]
        images = sum(segment.count for segment in bare)
        if not self.notes.get("trained") or len(store) > 4 * self.notes["trained_on"]:
            shards, bare = [], store.segments
            self._train(store, progress)
        elif images < max(self.notes.get("exact_below", EXACT_BELOW) // 4, len(store) // 10):
            bare = []  # few enough to be read
        for group in _groups(bare, _SHARD):
            name = f"shard-{group[0].serial:06d}-{group[-1].serial:06d}.faiss"
            self._add(store, group, name, progress)
            shards = [*shards, {"file": name, "segments": [s.serial for s in group]}]
        self._note(store, {**self.notes, "shards": shards})

    def _train(self, store: Store, progress: bool) -> None:
        """Learn lists and codes from a sample of rows."""
        faiss = _faiss()
        model = store.manifest.model
        rows = len(store) * model.queries
        lists = max(4, 2 ** round(math.log2(math.sqrt(rows))))
        # Product quantisation is an eighth of the size, but takes FAISS minutes to train.
        sample = _sampled_rows(store, min(rows, max(48 * lists, 16_384)))
        if progress:
            tqdm.write(f"training {lists} lists on {len(sample)} of {rows} rows")
        index = faiss.index_factory(model.width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 5  # its warnings are for people who call it themselves
        index.train(sample)
        name = f"trained-{store.manifest.serial:06d}.faiss"
        self._write(index, name)
        self.notes |= {"trained": name, "trained_on": len(store), "nprobe": max(8, lists // 8), "lists": lists}

    def _add(self, store: Store, group: Sequence[Segment], name: str, progress: bool) -> None:
        index = _faiss().read_index(str(self.folder / self.notes["trained"]))
        total = sum(segment.count for segment in group)
        with tqdm(total=total, unit="image", desc="coding", disable=not progress) as bar:
            for segment in group:
                for start in range(0, segment.count, 1024):
                    part = np.arange(start, min(start + 1024, segment.count))
                    part = part[store.live(segment)[part]]
                    rows = segment.vectors[part].astype(np.float32)
                    ids = np.repeat(part, rows.shape[1]).astype(np.int64) + image_id(segment.serial, 0)
                    index.add_with_ids(rows.reshape(-1, rows.shape[2]), ids)
                bar.update(segment.count)
        self._write(index, name)

    def _write(self, index: Any, name: str) -> None:
        with writable(self.folder), replacing(self.folder / name, sync=True) as temporary:
            _faiss().write_index(index, str(temporary))
        self.notes["seals"] = {**self.notes.get("seals", {}), name: ends_of([self.folder / name])}

    def _note(self, store: Store, notes: dict[str, Any]) -> None:
        wanted = {notes.get("trained"), *(shard["file"] for shard in notes.get("shards", ()))}
        if "seals" in notes:
            notes["seals"] = {name: seal for name, seal in notes["seals"].items() if name in wanted}
        if notes != store.manifest.engine:
            store.note_engine(notes)
        self.notes, self._files, self._stamps = notes, {}, {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in wanted:
                remove(path)


def _by_image(scores_MR: Float, ids_MR: Ids) -> tuple[Ids, Float]:
    """Distinct images among the rows found, and about what each scores.

    An image that a vector of the query did not find scores there what its last row does.
    """
    there_MR = ids_MR >= 0
    distinct, inverse = np.unique(ids_MR[there_MR], return_inverse=True)
    lowest_M = np.where(there_MR, scores_MR, np.inf).min(axis=1, initial=np.inf)
    lowest_M[~np.isfinite(lowest_M)] = 0.0
    table_MN = np.repeat(lowest_M[:, None], len(distinct), axis=1)
    np.maximum.at(table_MN, (np.nonzero(there_MR)[0], inverse), scores_MR[there_MR])
    return distinct, table_MN.mean(axis=0)


def remove(path: Path) -> None:
    """Remove a file or a folder that may be gone already."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _fresh(shard: dict[str, Any], store: Store) -> bool:
    """Whether most of what an IVF file covers is still there."""
    there = [serial for serial in shard["segments"] if serial in store.by_serial]
    return len(there) > 0.7 * len(shard["segments"])


def _groups(segments: Sequence[Segment], size: int) -> Iterator[list[Segment]]:
    group: list[Segment] = []
    for segment in segments:
        if group and sum(s.count for s in group) + segment.count > size:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _sampled_rows(store: Store, count: int) -> Float:
    """About `count` rows [R, E], from all segments alike; the same ones each time."""
    rng = np.random.default_rng(0)
    share = count / max(1, sum(s.count for s in store.segments))
    parts = []
    for segment in store.segments:
        queries = segment.vectors.shape[1]
        wanted = min(max(1, round(share * segment.count)), segment.count * queries)
        rows = np.sort(rng.choice(segment.count * queries, wanted, replace=False))
        parts.append(segment.vectors[rows // queries, rows % queries].astype(np.float32))
    return np.concatenate(parts)


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(f"engine faiss: {MISSING}") from error
    return faiss
