"""LanceDB as the engine: a table of multi-vectors, on disk or in an object store.

Rows written twice by a killed run are deleted before a segment is written; ids of other times are
filtered by the caller.

Shape letters: Q queries, E contrastive width, M vectors of the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from blip2.errors import ConfigError, RunError
from blip2.search.segments import Ids, Segment, image_id
from blip2.search.store import Store

_TABLE = "queries"
_INDEXED = 5_000  # images from which LanceDB's own index is made; below, it reads every vector
_PART = 512  # images written at a time


class LanceEngine:
    """A table with one row per image and its Q vectors in one column.

    Notes in the manifest: `uri` (None is the index's own folder) and `segments`.
    """

    def __init__(self, store: Store) -> None:
        self.notes = store.manifest.engine
        self.uri = self.notes.get("uri") or str(store.path / "engine" / "lance")
        self._database = import_lancedb()
        self._table: Any = None

    def covered(self) -> set[int]:
        return set(self.notes.get("segments", ()))

    def candidates(self, query_ME: np.ndarray, count: int) -> Ids:
        """The best by LanceDB's own late interaction: summed over the query's vectors, best of an image's."""
        query = query_ME[0] if len(query_ME) == 1 else query_ME
        search = self._open().search(query, vector_column_name="vector").metric("cosine")
        found = search.nprobes(64).refine_factor(4).select(["id"]).limit(count).to_arrow()
        ids: Ids = found["id"].to_numpy().astype(np.int64)
        return ids

    def unchanged(self) -> bool:
        return True  # LanceDB's versions are its own matter

    def update(self, store: Store, progress: bool) -> None:
        have = self.covered()
        gone = sorted(have - set(store.by_serial))
        new = [segment for segment in store.segments if segment.serial not in have]
        if not new and not gone:
            return
        try:
            table = self._open(store, create=True)
            stale = [*gone, *(segment.serial for segment in new)]
            table.delete(f"serial IN ({', '.join(map(str, stale))})")
            total = sum(segment.count for segment in new)
            with tqdm(total=total, unit="image", desc="to LanceDB", disable=not progress) as bar:
                for segment in new:
                    for part in _parts(store, segment):
                        table.add(part)
                        bar.update(part.num_rows)
            if table.count_rows() >= _INDEXED:
                if any(index.columns == ["vector"] for index in table.list_indices()):
                    table.optimize()
                else:
                    table.create_index(metric="cosine", vector_column_name="vector")
        except (RuntimeError, ValueError, OSError) as error:
            raise RunError(f"{self.uri}: LanceDB cannot write: {str(error).splitlines()[0]}") from error
        store.note_engine({**self.notes, "segments": [s.serial for s in store.segments]})
        self.notes = store.manifest.engine

    def _open(self, store: Store | None = None, create: bool = False) -> Any:
        if self._table is None:
            try:
                database = self._database.connect(self.uri)
                if create and store is not None:
                    self._table = database.create_table(_TABLE, schema=_schema(store), exist_ok=True)
                else:
                    self._table = database.open_table(_TABLE)
            except (RuntimeError, ValueError, OSError) as error:
                raise RunError(f"{self.uri}: LanceDB cannot open its table: {str(error).splitlines()[0]}") from error
        return self._table


def import_lancedb() -> ModuleType:
    """LanceDB.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lancedb
    except ImportError as error:
        raise ConfigError("engine lancedb: LanceDB is not installed: pip install lancedb") from error
    return lancedb


def _schema(store: Store) -> Any:
    import pyarrow as pa

    vectors = pa.list_(pa.list_(pa.float32(), store.manifest.model.width))
    return pa.schema([("id", pa.int64()), ("serial", pa.int64()), ("vector", vectors)])


def _parts(store: Store, segment: Segment) -> Iterator[Any]:
    """Live rows of a segment as Arrow tables."""
    import pyarrow as pa

    rows = np.flatnonzero(store.live(segment))
    for start in range(0, len(rows), _PART):
        chosen = rows[start : start + _PART]
        vectors = segment.vectors[chosen].astype(np.float32)
        N, Q, E = vectors.shape
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), E)
        lists = pa.ListArray.from_arrays(pa.array(np.arange(0, N * Q + 1, Q, dtype=np.int32)), flat)
        ids = pa.array(chosen + image_id(segment.serial, 0))
        serials = pa.array(np.full(N, segment.serial))
        yield pa.table({"id": ids, "serial": serials, "vector": lists}, schema=_schema(store))
