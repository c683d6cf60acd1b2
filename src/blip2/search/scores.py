"""Exact scores of query embeddings and of stored captions, read from the segments as they lie on disk.

A text is one vector, and an image scores the largest dot product over its Q query embeddings (ITC,
arXiv 2301.12597, section 3.2). An image as the query is Q vectors: the mean over them of the same
maximum. Both are `max_similarity`.

Shape letters: N images, Q queries, E contrastive width, M vectors of the query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blip2.ops.devices import to_numpy
from blip2.search.segments import Half, Ids, Segment, image_id
from blip2.search.store import Store

Scores = npt.NDArray[np.float32]
_CHUNK = 512  # images scored together: 16 MiB in float32 at 32 x 256, which stays near the processor


def max_similarity(vectors_NQE: Tensor, query_ME: Tensor) -> Tensor:
    """[N] float32: per query vector the largest dot product over an image's Q, averaged over the M."""
    N, Q, E = vectors_NQE.shape
    dots_NQM = (vectors_NQE.reshape(N * Q, E).float() @ query_ME.T).view(N, Q, -1)
    return dots_NQM.amax(dim=1).mean(dim=1)


def vector_scores(vectors: Half, query_ME: Tensor) -> Scores:
    """[N] scores of vectors [N, Q, E]."""
    scores = np.empty(len(vectors), dtype=np.float32)
    for start in range(0, len(vectors), _CHUNK):
        part = torch.from_numpy(np.asarray(vectors[start : start + _CHUNK]))
        scores[start : start + _CHUNK] = to_numpy(max_similarity(part, query_ME))
    return scores


def scores_of(store: Store, ids: Ids, query_ME: Tensor) -> Scores:
    """Exact scores of some images."""
    parts = [vector_scores(store.vectors(ids[n : n + _CHUNK]), query_ME) for n in range(0, len(ids), _CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def caption_scores(segment: Segment, query_E: Tensor) -> Scores:
    """[N] largest cosine over each image's captions; minus infinity where it has none."""
    scores = np.full(segment.count, -np.inf, dtype=np.float32)
    if len(segment.owners):
        cosines = torch.from_numpy(np.asarray(segment.caption_vectors)).float() @ query_E
        np.maximum.at(scores, segment.owners, to_numpy(cosines))
    return scores


def exact_top(store: Store, segments: Iterable[Segment], query_ME: Tensor, count: int) -> tuple[Ids, Scores]:
    """The `count` best images of some segments, best first, by reading all of their vectors."""
    return _top_of(store, segments, lambda segment: vector_scores(segment.vectors, query_ME), count)


def caption_top(store: Store, query_E: Tensor, count: int) -> tuple[Ids, Scores]:
    """The `count` images whose stored captions are nearest to a text, best first."""
    return _top_of(store, store.segments, lambda segment: caption_scores(segment, query_E), count)


def top(ids: Ids, scores: Scores, count: int) -> tuple[Ids, Scores]:
    """The `count` best, best first; of equal scores the image that was added first."""
    order = np.lexsort((ids, -scores))[:count]
    return ids[order], scores[order]


def _top_of(
    store: Store, segments: Iterable[Segment], score: Callable[[Segment], Scores], count: int
) -> tuple[Ids, Scores]:
    """The `count` best images with a finite score."""
    ids, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for segment in segments:
        own = np.where(store.live(segment), score(segment), np.float32(-np.inf))
        numbers = np.argpartition(-own, count - 1)[:count] if len(own) > count else np.arange(len(own))
        numbers = numbers[np.isfinite(own[numbers])]
        ids = np.concatenate([ids, numbers + image_id(segment.serial, 0)])
        scores = np.concatenate([scores, own[numbers]])
        if len(ids) > 64 * count:
            ids, scores = top(ids, scores, count)
    return top(ids, scores, count)
