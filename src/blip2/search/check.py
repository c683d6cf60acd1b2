"""What an index holds, whether its files are intact, and whether its engine finds what exact search finds.

Shape letters: Q queries, E contrastive width, M vectors of the query.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip2.search.build import exists
from blip2.search.query import Index
from blip2.search.segments import Segment

DEPTH = 10  # recall@10


def statistics(index: Index) -> dict[str, Any]:
    """Counts, sizes in bytes, the model and the engine."""
    store = index.store
    covered = index.engine.covered()
    rows = [row for _, row in store.items()]
    engine = store.path / "engine"
    return {
        "path": str(store.path),
        "images": len(rows),
        "captions": sum(len(row.captions) for row in rows),
        "gone": sum(not exists(row) for row in rows),
        "removed": sum(map(len, store.manifest.removed.values())),
        "segments": len(store.segments),
        "bytes": {
            "segments": sum(segment.bytes for segment in store.segments),
            "engine": sum(p.stat().st_size for p in engine.rglob("*") if p.is_file()) if engine.is_dir() else 0,
        },
        "model": str(store.manifest.model),
        "vectors": [store.manifest.model.queries, store.manifest.model.width],
        "engine": store.manifest.engine["name"],
        "approximate": sum(int(store.live(s).sum()) for s in store.segments if s.serial in covered),
    }


def check(index: Index, queries: int = 100) -> dict[str, Any]:
    """Damage, and recall@10 with times of the engine against reading every vector.

    The queries are stored captions where there are any, else single query embeddings of indexed
    images, which are easier to find than a text.

    Returns:
        `damaged`: segments with a byte that is not the one written, or a vector that is not of unit
        length; `recall`, `ms`, `exact_ms`, `queries` and `kind`.
    """
    store = index.store
    damaged = [segment.serial for segment in store.segments if not (segment.intact() and _of_unit_length(segment))]
    kind, queries_NE = _queries(index, queries)
    result: dict[str, Any] = {"damaged": damaged, "queries": len(queries_NE), "kind": kind, "depth": DEPTH}
    if not len(queries_NE):
        return {**result, "recall": None}
    recalls, times, exact_times = [], [], []
    for query_E in queries_NE:
        start = time.perf_counter()
        ids, _ = index.nearest(query_E[None], DEPTH)
        between = time.perf_counter()
        best, _ = index.nearest(query_E[None], DEPTH, exact=True)
        times.append(between - start)
        exact_times.append(time.perf_counter() - between)
        recalls.append(len(np.intersect1d(ids, best)) / len(best))
    return {
        **result,
        "recall": float(np.mean(recalls)),
        "ms": round(1e3 * float(np.median(times)), 2),
        "exact_ms": round(1e3 * float(np.median(exact_times)), 2),
    }


def _of_unit_length(segment: Segment) -> bool:
    """Whether every vector is of unit length, as far as fp16 can tell."""
    for start in range(0, segment.count, 512):
        norms = torch.from_numpy(np.asarray(segment.vectors[start : start + 512])).float().norm(dim=-1)
        if not bool(((norms - 1).abs() < 1e-2).all()):
            return False
    return True


def _queries(index: Index, count: int) -> tuple[str, Tensor]:
    """Kind (`captions` or `query embeddings`) and vectors [count, E] of queries, spread over the index."""
    store, rng = index.store, np.random.default_rng(0)
    width = store.manifest.model.width
    captioned = [np.asarray(s.caption_vectors[store.live(s)[s.owners]]) for s in store.segments if len(s.owners)]
    texts = np.concatenate([np.empty((0, width), np.float16), *captioned])
    if len(texts):
        chosen = rng.permutation(len(texts))[:count]
        return "captions", torch.from_numpy(texts[chosen]).float()
    ids = np.array([image for image, _ in store.items()], dtype=np.int64)
    chosen = ids[rng.permutation(len(ids))[:count]]
    vectors = store.vectors(chosen)
    which = rng.integers(0, vectors.shape[1], len(chosen))
    return "query embeddings", torch.from_numpy(vectors[np.arange(len(chosen)), which]).float()
