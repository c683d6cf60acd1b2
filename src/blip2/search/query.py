"""Search in an index: candidates by ITC, re-ranked by ITM.

    index = Index.open("photos.index")
    index.search("two dogs in the snow", k=5)             # list of Hit, best first
    index.search(image="dog.jpg")                         # images like this one
    index.search("in the snow", image="dog.jpg")          # both at once

Shape letters: Q queries, E contrastive width, M vectors of the query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from blip2.data.collection import BadSampleError, Sample
from blip2.data.images import ImageLike, open_image
from blip2.errors import ConfigError, DataError
from blip2.inference import Blip2, load
from blip2.ops.devices import to_numpy
from blip2.search.engines import Engine
from blip2.search.model_id import identify, require_same
from blip2.search.scores import Scores, caption_scores, caption_top, exact_top, scores_of, top
from blip2.search.segments import Ids, Row
from blip2.search.store import Store

FIELDS = ("images", "captions", "both")
_RERANKED = 128
_CANDIDATES = 4  # of an approximate engine, scored exactly for each image to be found


@dataclass(frozen=True)
class Hit:
    """An image of a search's result.

    Args:
        path: its file, or the shard that holds it.
        score: what hits are ordered by; comparable within one search, and there among those that were
            re-ranked, or among those that were not.
        parts: exact scores that went into it: `text` and `image` (cosines, largest over the queries),
            `caption` (cosine), `itm` (probability that text and image belong together).
        captions: stored ones.
        state: `ok`; `gone` where the file does not exist any more, `changed` where another image is
            in its place. Both are ranked by their stored vectors and cannot be re-ranked.
    """

    key: str
    path: str
    score: float
    parts: dict[str, float]
    captions: tuple[str, ...]
    state: str
    row: Row

    @property
    def caption(self) -> str | None:
        """The first stored caption."""
        return self.captions[0] if self.captions else None


class Index:
    """An index open for search.

    Args:
        store: its files.
        model: to embed what is searched for; None loads the one that the index was built with when
            it is first needed.
    """

    def __init__(self, store: Store, model: Blip2 | None = None) -> None:
        self.store, self._model = store, model
        self.engine = Engine(store)

    @classmethod
    def open(cls, path: str | Path, model: Blip2 | str | None = None) -> Index:
        """Open an index.

        Args:
            model: loaded model or its name.

        Raises:
            DataError: no index there, or damaged.
            CheckpointError: the model given cannot be loaded.
        """
        return cls(Store(path), load(model) if isinstance(model, str) else model)

    def __len__(self) -> int:
        return len(self.store)

    def refresh(self) -> None:
        """Read what was written since the index was opened; cheap where nothing was.

        Raises:
            DataError: the index is gone or damaged by now.
            ConfigError: it was rebuilt with another model.
        """
        store = self.store.current()
        if store is not self.store:
            now, before = store.manifest.model, self.store.manifest.model
            if now.fingerprint != before.fingerprint:
                raise ConfigError(
                    f"{store.path}: this index was rebuilt with {now}; it was {before} when it was opened: open it "
                    "again with the new model, or put the old index back"
                )
        if store is not self.store or not self.engine.unchanged():
            self.store, self.engine = store, Engine(store)

    @cached_property
    def model(self) -> Blip2:
        """The model of the index.

        Raises:
            ConfigError: the one given is not the one that the index was built with; names both.
        """
        model = self._model or load(self.store.manifest.model.name)
        require_same(self.store, identify(model, str(model.home or "the model at hand")))
        return model

    def search(
        self,
        text: str | None = None,
        image: ImageLike | None = None,
        *,
        k: int = 20,
        rerank: int | None = None,
        within: str = "images",
        progress: bool = False,
    ) -> list[Hit]:
        """The `k` best images, best first.

        Args:
            text: what to see; an image scores the largest cosine over its query embeddings.
            image: image to compare with; the mean over its query embeddings of that largest cosine.
            rerank: number of the best candidates of a text that are read and encoded again, and whose ITM logit is
                added to cosine / temperature, the scale that ITC was trained on (captions, and several scores at
                once, are added as they are). 0 for none; None takes 128, and none where the model never learned
                ITM.
            within: `images`, stored `captions`, or `both`.

        Several scores (text and image, or both fields) are each shifted and scaled to mean 0 and
        deviation 1 over the candidates of all, and averaged.

        Raises:
            ConfigError: nothing to search for, or captions that are not stored.
        """
        text = text.strip() if text else None
        if rerank is None:
            rerank = _RERANKED if text and self.model.has_itm else 0
        if k < 1 or rerank < 0:
            raise ConfigError(f"k is {k} and rerank is {rerank}: they must be at least 1 and 0")
        parts = self._parts(text, image, within)
        count = max(k, rerank if text else 0)
        candidates = np.unique(np.concatenate([part.top(count) for part in parts.values()]))
        scores = {name: part.score(candidates) for name, part in parts.items()}
        ids, totals = top(candidates, combined(list(scores.values())), count)
        hits = []
        for image_id, place, total in zip(ids, np.searchsorted(candidates, ids), totals, strict=True):
            row = self.store.row(int(image_id))
            known = {name: float(s[place]) for name, s in scores.items() if np.isfinite(s[place])}
            hits.append(Hit(row.key, row.path, float(total), known, row.captions, "ok", row))
        if text and rerank:
            weight = self.model.stage1.itc_scale if list(parts) == ["text"] else 1.0
            hits = self._reranked(hits[:rerank], text, weight, progress) + hits[rerank:]
        return [hit if "itm" in hit.parts else replace(hit, state=read(hit.row)[1]) for hit in hits[:k]]

    def nearest(self, query_ME: Tensor, count: int, *, exact: bool = False) -> tuple[Ids, Scores]:
        """The `count` best images of a query's vectors with their exact scores, best first.

        Args:
            exact: read every vector, whatever the engine covers.
        """
        covered = set() if exact else self.engine.covered()
        uncovered = (segment for segment in self.store.segments if segment.serial not in covered)
        ids, scores = exact_top(self.store, uncovered, query_ME, count)
        if covered:
            candidates = self.engine.candidates(to_numpy(query_ME), _CANDIDATES * max(count, 64))
            candidates = self.store.living(np.unique(candidates))
            candidates = candidates[np.isin(candidates >> 32, list(covered))]
            ids = np.concatenate([ids, candidates])
            scores = np.concatenate([scores, scores_of(self.store, candidates, query_ME)])
        return top(ids, scores, count)

    def _parts(self, text: str | None, image: ImageLike | None, within: str) -> dict[str, _Part]:
        """What is looked for, by the names of `Hit.parts`."""
        if within not in FIELDS:
            raise ConfigError(f"within is {within!r}: it must be one of {', '.join(FIELDS)}")
        if not text and image is None:
            raise ConfigError("nothing to search for: give a text, an image, or both")
        if within != "images" and (not text or self.store.manifest.captions is None):
            reason = "captions are searched by a text" if not text else f"{self.store.path} holds no captions"
            raise ConfigError(f"{reason}: `blip2 index build --captions` stores them")
        parts = {}
        if text:
            query_E = self.model.embed_texts(text)[0]
            if within != "captions":
                parts["text"] = self._by_vectors(query_E[None])
            if within != "images":
                parts["caption"] = _Part(
                    lambda count: caption_top(self.store, query_E, count)[0],
                    lambda ids: caption_scores_of(self.store, ids, query_E),
                )
        if image is not None:
            parts["image"] = self._by_vectors(self.model.embed_images(open_image(image))[0])
        return parts

    def _by_vectors(self, query_ME: Tensor) -> _Part:
        return _Part(lambda count: self.nearest(query_ME, count)[0], lambda ids: scores_of(self.store, ids, query_ME))

    def _reranked(self, hits: list[Hit], text: str, weight: float, progress: bool) -> list[Hit]:
        """Hits by weighted score + ITM class-1 logit; those whose file cannot be read follow as they were."""
        model = self.model
        reranked, unreadable = [], []
        bar = tqdm(total=len(hits), unit="image", desc="re-ranking", disable=not progress, leave=False)
        for start in range(0, len(hits), model.batch):
            chunk = [(hit, read(hit.row)[0]) for hit in hits[start : start + model.batch]]
            readable = [(hit, data) for hit, data in chunk if data is not None]
            unreadable += [hit for hit, data in chunk if data is None]
            if readable:
                kv = model.image_kv(model.features([data for _, data in readable]))
                logits = model.match_logits(kv, [text] * len(readable))
                for (hit, _), logit, chance in zip(readable, logits[:, 1], logits.softmax(-1)[:, 1], strict=True):
                    parts = {**hit.parts, "itm": float(chance)}
                    reranked.append(replace(hit, score=weight * hit.score + float(logit), parts=parts))
            bar.update(len(chunk))
        bar.close()
        return sorted(reranked, key=lambda hit: -hit.score) + unreadable


@dataclass(frozen=True)
class _Part:
    """One of the scores of a search: the images that are best by it alone, and the exact scores of any images."""

    top: Callable[[int], Ids]
    score: Callable[[Ids], Scores]


def combined(scores: list[Scores]) -> Scores:
    """One score per image: as it is where there is one; else the mean of all, each standardised."""
    if len(scores) == 1:
        return scores[0]
    total = np.zeros_like(scores[0])
    for values in scores:
        known = np.isfinite(values)
        lowest = values[known].min() if known.any() else 0.0
        values = np.where(known, values, lowest)  # an image without a caption is as far as the farthest
        total += (values - values.mean()) / max(float(values.std()), 1e-6) / len(scores)
    return total


def caption_scores_of(store: Store, ids: Ids, query_E: Tensor) -> Scores:
    """Largest cosine over each image's captions; minus infinity where it has none."""
    scores = np.full(len(ids), -np.inf, dtype=np.float32)
    for segment, mask, numbers in store.by_segment(ids):
        scores[mask] = caption_scores(segment, query_E)[numbers]
    return scores


def read(row: Row) -> tuple[bytes | None, str]:
    """An image's bytes and its state; no bytes but those that were indexed."""
    try:
        data = Sample(row.key, row.key, (), row.path, row.offset, row.size).read()
    except (BadSampleError, DataError):
        return None, "gone"
    if hashlib.sha256(data).hexdigest()[:32] != row.digest:
        return None, "changed"
    return data, "ok"
