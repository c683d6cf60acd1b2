"""The approximate engine of an index: FAISS's IVF over all query vectors, which finds candidates without reading every
vector.

`candidates` names images that are probably among the best, and the caller scores them exactly from the stored
vectors. Segments that are not covered are read in full: all of them with the engine `exact`, below `exact_below`
images, and without FAISS. Files lie in INDEX/engine; the manifest says which of them count.

Shape letters: Q queries, E contrastive width, M vectors of the query, R rows (query vectors).
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from blip2.errors import DataError
from blip2.io.atomic import replacing
from blip2.search.segments import Ids, Segment, Stamp, digest_of_ends, groups, image_id, stamp
from blip2.search.store import Store, writable

Float = npt.NDArray[np.float32]

EXACT_BELOW = 20_000  # images up to which reading every vector is fast enough
REPLACED = {"lancedb": "faiss"}  # engines of earlier versions, and what takes their place
_SHARD = 250_000  # images of one IVF file: 2.1 GB of memory while it is made, at 32 x 256
_MAX_SHARDS = 8  # more files than that are made anew
_SETTINGS = ("name", "exact_below")


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    return importlib.util.find_spec("faiss") is not None


def current_name(name: str) -> str:
    """The engine that a name stands for today; says on stderr where it is another."""
    if name in REPLACED:
        print(
            f"engine {name} is not supported any more: {REPLACED[name]} takes its place (docs/search.md); every vector "
            "is read until `blip2 index add` has made its files",
            file=sys.stderr,
        )
    return REPLACED.get(name, name)


class Engine:
    """IVF with codes of one byte per number, in memory-mapped files that share one training.

    Notes in the manifest: `name`, `exact_below`, `trained` (file), `trained_on` (images), `lists`, `nprobe`, `shards`,
    each with its `file` and its `segments`, and `seals`: by file, the digest of its ends.
    """

    def __init__(self, store: Store) -> None:
        self.folder, self.notes = store.path / "engine", store.manifest.engine
        self._files: dict[str, tuple[Any, Stamp]] = {}
        current_name(self.notes["name"])

    def covered(self) -> set[int]:
        """Serials of the segments whose images `candidates` knows."""
        shards = self.notes.get("shards", ()) if has_faiss() else ()
        return {serial for shard in shards for serial in shard["segments"]}

    def candidates(self, query_ME: Float, count: int) -> Ids:
        """Distinct images, `count` or more where there are so many; some may be removed from the index by now.

        Rows are over-fetched until enough distinct images are among them; the best by their codes are named.
        """
        query_ME = np.ascontiguousarray(query_ME, dtype=np.float32)
        rows, before = (8 if len(query_ME) == 1 else 2) * count, -1
        while True:
            results = [self._open(shard["file"]).search(query_ME, rows) for shard in self.notes["shards"]]
            scores_MR, ids_MR = (np.concatenate(part, axis=1) for part in zip(*results, strict=True))
            ids, scores = _by_image(scores_MR, ids_MR)
            if len(ids) >= count or len(ids) == before:
                best: Ids = ids[np.argsort(-scores, kind="stable")[: 4 * count]]
                return best
            rows, before = 4 * rows, len(ids)

    def unchanged(self) -> bool:
        """Whether the files that it has open are still those on the disk."""
        try:
            return all(stamp(self.folder / name) == opened for name, (_, opened) in self._files.items())
        except OSError:
            return False

    def _open(self, name: str) -> Any:
        if name not in self._files:
            import faiss

            try:
                opened = stamp(self.folder / name)
                if not self._is_intact(name):
                    raise OSError("it is not the file that was written")
                index: Any = faiss.read_index(str(self.folder / name), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            except (RuntimeError, OSError) as error:
                raise DataError(
                    f"{self.folder / name}: FAISS cannot read it: search again if the index is being changed, else "
                    "delete the folder `engine` and run `blip2 index add` on what it holds"
                ) from error
            index.nprobe = self.notes["nprobe"]
            # its threads read ahead after a search has ended: a file that is cut meanwhile would end the process
            lists: Any = faiss.downcast_InvertedLists(index.invlists)
            lists.prefetch_nthread = 0
            self._files[name] = index, opened
        return self._files[name][0]

    def _is_intact(self, name: str) -> bool:
        """Whether a file is there and, as far as its ends tell, the one that was written."""
        try:
            ends = digest_of_ends([self.folder / name])
        except OSError:
            return False
        return ends == self.notes.get("seals", {}).get(name, ends)

    # -- writing ------------------------------------------------------------------------------

    def update(self, store: Store, progress: bool) -> None:
        """Cover what is worth it, drop what is removed, and note both in the manifest; under `store.writing()`."""
        self.notes = dict(store.manifest.engine)
        settings = {key: self.notes[key] for key in _SETTINGS if key in self.notes}
        settings["name"] = REPLACED.get(settings["name"], settings["name"])
        exact_below = settings.get("exact_below", EXACT_BELOW)
        if settings["name"] == "exact" or len(store) < exact_below:
            self._note(store, settings)
            return
        if not has_faiss():
            message = "FAISS is not installed (pip install faiss-cpu); every search reads every vector until then"
            tqdm.write(f"{store.path}: {message}", file=sys.stderr)
            return
        shards = [s for s in self.notes.get("shards", ()) if self._is_intact(s["file"]) and _mostly_there(s, store)]
        if len(shards) > _MAX_SHARDS:
            shards = []
        covered = {serial for shard in shards for serial in shard["segments"]}
        uncovered = [segment for segment in store.segments if segment.serial not in covered]
        if not self._is_intact(self.notes.get("trained", "")) or len(store) > 4 * self.notes["trained_on"]:
            shards, uncovered = [], store.segments
            self.notes = settings
            self._train(store, progress)
        elif sum(segment.count for segment in uncovered) < max(exact_below // 4, len(store) // 10):
            uncovered = []  # few enough to be read
        for group in groups(uncovered, lambda segment: segment.count, _SHARD):
            name = f"shard-{group[0].serial:06d}-{group[-1].serial:06d}.faiss"
            self._encode(store, group, name, progress)
            shards = [*shards, {"file": name, "segments": [s.serial for s in group]}]
        self._note(store, {**self.notes, "shards": shards})

    def _train(self, store: Store, progress: bool) -> None:
        """Learn lists and codes from a sample of rows."""
        import faiss

        model = store.manifest.model
        rows = len(store) * model.queries
        lists = max(4, 2 ** round(math.log2(math.sqrt(rows))))
        # Product quantisation is an eighth of the size, but takes FAISS minutes to train.
        sample_RE = _sampled_rows(store, min(rows, max(48 * lists, 16_384)))
        if progress:
            tqdm.write(f"training {lists} lists on {len(sample_RE)} of {rows} rows")
        index: Any = faiss.index_factory(model.width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 5  # its warnings are for people who call it themselves
        index.train(sample_RE)
        name = f"trained-{store.manifest.serial:06d}.faiss"
        self._write(index, name)
        self.notes |= {"trained": name, "trained_on": len(store), "nprobe": max(8, lists // 8), "lists": lists}

    def _encode(self, store: Store, group: Sequence[Segment], name: str, progress: bool) -> None:
        """Write the codes of some segments to one file."""
        import faiss

        index = faiss.read_index(str(self.folder / self.notes["trained"]))
        total = sum(segment.count for segment in group)
        with tqdm(total=total, unit="image", desc="coding", disable=not progress) as bar:
            for segment in group:
                live = np.flatnonzero(store.live(segment))
                for start in range(0, len(live), 1024):
                    numbers = live[start : start + 1024]
                    vectors = segment.vectors[numbers].astype(np.float32)
                    ids = np.repeat(numbers, vectors.shape[1]).astype(np.int64) + image_id(segment.serial, 0)
                    index.add_with_ids(vectors.reshape(-1, vectors.shape[2]), ids)
                bar.update(segment.count)
        self._write(index, name)

    def _write(self, index: Any, name: str) -> None:
        import faiss

        with writable(self.folder), replacing(self.folder / name, sync=True) as temporary:
            faiss.write_index(index, str(temporary))
        self.notes["seals"] = {**self.notes.get("seals", {}), name: digest_of_ends([self.folder / name])}

    def _note(self, store: Store, notes: dict[str, Any]) -> None:
        """Commit notes, and delete the files that they do not name."""
        named = {notes.get("trained"), *(shard["file"] for shard in notes.get("shards", ()))}
        if "seals" in notes:
            notes["seals"] = {name: seal for name, seal in notes["seals"].items() if name in named}
        if notes != store.manifest.engine:
            store.note_engine(notes)
        self.notes, self._files = notes, {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in named:
                path.unlink(missing_ok=True)


def _by_image(scores_MR: Float, ids_MR: Ids) -> tuple[Ids, Float]:
    """Distinct images among the rows, and about what each scores.

    Where a vector of the query has no row of an image, that image scores what the vector's last row does.
    """
    known_MR = ids_MR >= 0
    ids, inverse = np.unique(ids_MR[known_MR], return_inverse=True)
    lowest_M = np.where(known_MR, scores_MR, np.inf).min(axis=1, initial=np.inf)
    lowest_M[~np.isfinite(lowest_M)] = 0.0
    scores_MN = np.repeat(lowest_M[:, None], len(ids), axis=1)
    np.maximum.at(scores_MN, (np.nonzero(known_MR)[0], inverse), scores_MR[known_MR])
    return ids, scores_MN.mean(axis=0)


def _mostly_there(shard: dict[str, Any], store: Store) -> bool:
    """Whether more than 70% of the segments of an IVF file still count."""
    remaining = [serial for serial in shard["segments"] if serial in store.by_serial]
    return len(remaining) > 0.7 * len(shard["segments"])


def _sampled_rows(store: Store, count: int) -> Float:
    """About `count` rows [R, E], the same share of every segment; the same ones each time."""
    rng = np.random.default_rng(0)
    share = count / max(1, sum(s.count for s in store.segments))
    parts = []
    for segment in store.segments:
        queries = segment.vectors.shape[1]
        size = min(max(1, round(share * segment.count)), segment.count * queries)
        rows = np.sort(rng.choice(segment.count * queries, size, replace=False))
        parts.append(segment.vectors[rows // queries, rows % queries].astype(np.float32))
    return np.concatenate(parts)
