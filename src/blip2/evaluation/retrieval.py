"""`blip2 evaluate retrieval`: recall by ITC, and of the best candidates re-ranked by ITM, in both directions.

Shape letters: I images, T texts, Q queries, P patches, C image-encoder channels, E contrastive width.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from blip2.configs.checks import require
from blip2.data.collection import Collection, Sample
from blip2.errors import ConfigError, DataError
from blip2.evaluation.inputs import require_captions
from blip2.evaluation.prediction_log import Entries, Folder, work_through
from blip2.evaluation.report import Outcome
from blip2.inference import Blip2
from blip2.metrics.retrieval import (
    bidirectional_recall,
    candidate_pairs,
    fill_with_similarity,
    recall_at_k,
    reranked_scores,
    retrieval_ranks,
)
from blip2.ops import distributed
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import to_list, to_numpy

# Bytes of image features that are kept in memory from ITC to ITM.
KEPT_FEATURES = 2_000_000_000


class Retrieval:
    """Rank by ITC, then re-rank the best `-k` of both directions by `--itc-weight` x ITC + ITM.

    Raises:
        ConfigError: an option is refused.
        DataError: fewer than two images, or one without a caption.
    """

    def __init__(self, options: argparse.Namespace, data: Collection) -> None:
        require(options.k >= 1, "-k", options.k, "1 or more")
        try:
            self.weight = None if options.itc_weight == "auto" else float(options.itc_weight)
        except ValueError:
            raise ConfigError(f"--itc-weight is {options.itc_weight!r}: it must be a number or auto") from None
        require_captions(data)
        if len(data.samples) < 2:
            raise DataError(f"{data.name}: {len(data.samples)} image: retrieval needs two or more")
        self.data, self.k = data, options.k

    def settings(self, model: Blip2) -> dict[str, Any]:
        """What of the options can move the numbers."""
        return {"k": self.k, "itc_weight": round(self._itc_weight(model), 4), "max_text": model.config.qformer.max_text}

    def _itc_weight(self, model: Blip2) -> float:
        """`--itc-weight`; 1 / temperature of the model for `auto`."""
        return model.stage1.itc_scale if self.weight is None else self.weight

    def run(self, model: Blip2, folder: Folder) -> Outcome:
        """Match the pairs that are not in the folder yet, and rank all.

        Both directions' candidate pairs are joined and grouped by image: an image is encoded (again where
        features of all are more than `KEPT_FEATURES`) and projected once, and meets all its texts.
        """
        samples = self.data.samples
        texts = [text for sample in samples for text in sample.captions]
        owners = np.array([n for n, sample in enumerate(samples) for _ in sample.captions])
        queries_IQE, cached = _embed(samples, model)
        similarity_IT = to_numpy(query_text_similarity(queries_IQE, model.embed_texts(texts)))
        pairs = candidate_pairs(similarity_IT, self.k)

        def predict(chunk: list[int]) -> Entries:
            features = {n: cached[n] for n in chunk if n in cached}
            if missing := [n for n in chunk if n not in cached]:
                features |= zip(missing, model.features([samples[n].read() for n in missing]), strict=True)
            return [_matches(model, features[n][None].to(model.device), texts, pairs[n]) for n in chunk]

        entries = work_through([sample.key for sample in samples], folder, predict, batch=model.batch, unit="image")
        matches = [(np.array(entry["texts"], np.int64), np.array(entry["itm"], np.float32)) for entry in entries]
        scores = reranked_scores(similarity_IT, matches, self.k, self._itc_weight(model))
        by_image_IT, by_text_IT = (fill_with_similarity(scores_IT, similarity_IT) for scores_IT in scores)
        metrics = {
            "itc": recall_at_k(similarity_IT, owners),
            "reranked": bidirectional_recall(by_image_IT, by_text_IT, owners),
        }
        ranks, _ = retrieval_ranks(by_image_IT, owners)
        for entry, sample, rank, scores_T in zip(entries, samples, ranks, by_image_IT, strict=True):
            entry |= {"best": texts[int(scores_T.argmax())], "references": list(sample.captions), "rank": int(rank)}
            entry["score"] = -float(rank)
        notes = [f"{len(samples)} images, {len(texts)} texts, {sum(map(len, pairs))} pairs matched"]
        if not model.has_itm:
            notes.append("this model was trained without ITM: what is re-ranked means nothing")
        return Outcome(metrics, entries, notes=tuple(notes))

    def example(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A ranking as the page shows it."""
        score = f"its own text at rank {entry['rank']}"
        return {"text": entry["best"], "references": entry["references"], "score": score}


def _matches(model: Blip2, features_1PC: Tensor, texts: list[str], chosen: npt.NDArray[np.int64]) -> dict[str, Any]:
    """ITM class-1 logits of one image with its candidate texts."""
    kv = model.image_kv(features_1PC)
    size = 8 * model.batch  # texts are many and short
    candidates = [texts[t] for t in chosen]
    logits = [model.match_logits(kv, candidates[start : start + size]) for start in range(0, len(candidates), size)]
    return {"texts": to_list(chosen), "itm": [round(v, 6) for v in to_list(torch.cat(logits)[:, 1])]}


def _embed(samples: list[Sample], model: Blip2) -> tuple[Tensor, dict[int, Tensor]]:
    """Query embeddings [I, Q, E], with a progress bar, and the features [P, C] of the images that there is room for.

    ITC wants every image before the first pair is matched.
    """
    embedded, cached, used = [], dict[int, Tensor](), 0
    with tqdm(total=len(samples), unit="image", desc="embedding", disable=distributed.rank() > 0) as bar:
        for start in range(0, len(samples), model.batch):
            chunk = samples[start : start + model.batch]
            features_BPC = model.features([sample.read() for sample in chunk])
            embedded.append(model.embed_features(features_BPC))
            used += features_BPC.nbytes
            if used <= KEPT_FEATURES:
                cached |= dict(enumerate(features_BPC.to("cpu"), start))
            bar.update(len(chunk))
    return torch.cat(embedded), cached
