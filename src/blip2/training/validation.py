"""Evaluation on dev during training: loss, recall, and captions of the same few images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blip2.configs import DecodingConfig
from blip2.data.batch import Batch
from blip2.data.collection import BadSampleError, Collection, Sample
from blip2.data.feature_cache import FeatureCache
from blip2.data.film import read_images
from blip2.data.loader import dev_batches
from blip2.inference import Blip2
from blip2.io.atomic import write_json
from blip2.metrics.retrieval import bidirectional_recall, candidate_pairs, recall_at_k, reranked_scores
from blip2.metrics.table import METRICS, measure
from blip2.ops import distributed
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import to_numpy

THUMB = 224
# Dev images of stage 2 at a time.
DECODED = 32
# Candidates per image and per text that ITM re-ranks on dev while training.
RERANKED = 8


class DevEvaluator:
    """Called by the trainer with the number of steps done; returns numbers for the `dev` line.

    Args:
        model: the run's model, with the interface that users have.
        objective: gives the dev loss, on the first caption of each image.
        collection: dev images, already limited.
        features: cached features of the same collection, or None.
        folder: run folder; captions go to `samples/step-N.json`.
    """

    def __init__(
        self, model: Blip2, objective: nn.Module, collection: Collection, features: FeatureCache | None, folder: Path
    ) -> None:
        self.model, self.objective, self.config, self.folder = model, objective, model.config, folder
        self.collection, self.features = collection, features
        self.by_key = {sample.key: sample for sample in collection.samples}
        self.last_samples: list[dict[str, Any]] = []

    def __call__(self, step: int) -> dict[str, Any]:
        """Dev numbers: mean losses, ITC recall (stage 1), the number of `eval.best`; and two sample captions.

        The captions (or answers) of the sample images are written by the first process.
        """
        settings, stage1 = self.config.eval, self.config.stage == "stage1"
        losses: list[dict[str, float]] = []
        ranking = _Ranking(self.model, rerank=settings.best == "recall")
        entries: list[dict[str, Any]] = []
        count = settings.images if settings.best in METRICS else settings.samples
        for batch in self._batches():
            features = batch.features = self._features(batch)
            batch.pixels, batch.image_ids = None, batch.image_ids.to(self.model.device)
            if len(batch) > 1:
                losses.append({name: float(value) for name, value in self.objective(batch, 0).items()})
            if stage1:
                ranking.add(features, [self.by_key[key].captions for key in batch.keys])
            if len(entries) < count:
                entries += self._texts(batch, features, count - len(entries))
        means = {name: float(np.mean([line[name] for line in losses])) for name in (losses or [{}])[0]}
        numbers: dict[str, Any] = {"loss": sum(means.values()), **means} if means else {}
        if ranking.images:
            numbers |= ranking.recall()
        if settings.best in METRICS and entries:
            texts = [entry.get("answer", entry["caption"]) for entry in entries]
            numbers |= measure([settings.best], texts, [entry["references"] for entry in entries])
        self.last_samples = entries[: settings.samples]
        if distributed.rank() == 0 and self.last_samples:
            self._write(step)
        numbers["captions"] = [f"{entry['key']}: {entry['caption']}" for entry in entries[:2]]
        return numbers

    def _batches(self) -> Iterator[Batch]:
        # the losses of stage 1 depend on it (negatives); in stage 2 captions are faster in large batches
        size = min(64, self.config.train.batch) if self.config.stage == "stage1" else DECODED
        return dev_batches(
            self.collection,
            batch=size,
            spec=self.model.image_spec,
            features=self.features,
            texts="questions" if self.config.data.texts == "questions" else "captions",
            clean=self.config.data.clean,
        )

    def _features(self, batch: Batch) -> Tensor:
        if batch.features is not None:
            return batch.features.to(self.model.device)
        assert batch.pixels is not None
        with torch.no_grad():
            return self.model.vision(batch.pixels.to(self.model.device))

    def _texts(self, batch: Batch, features_MPC: Tensor, count: int) -> list[dict[str, Any]]:
        """Captions or answers of the first `count` samples of a batch, with their references."""
        entries: dict[int, dict[str, Any]] = {}
        for rows, features in batch.groups(features_MPC):
            own = [row for row in rows if row < count]
            if own:
                entries |= zip(own, self._texts_of(batch, own, features[: len(own)]), strict=True)
        return [entries[row] for row in sorted(entries)]

    def _texts_of(self, batch: Batch, rows: list[int], features: Tensor) -> list[dict[str, Any]]:
        """Those of samples with equally many images."""
        keys, limits = [batch.keys[row] for row in rows], self.config.eval
        if batch.questions is None:
            decoding = DecodingConfig(beams=limits.beams, min_tokens=limits.min_tokens, max_tokens=limits.max_tokens)
            captions = self.model.caption_features(features, None, decoding)
            return [_entry(key, text[0], self.by_key[key].captions) for key, text in zip(keys, captions, strict=True)]
        questions = [batch.questions[row] for row in rows]
        prompts = [self.config.language.question.format(question) for question in questions]
        decoding = DecodingConfig.for_answers(beams=limits.beams)
        answers = self.model.generate(features, prompts, decoding, questions=questions)
        return [
            {**_entry(key, f"{question} {answer[0]}", self._references(key, question)), "answer": answer[0]}
            for key, question, answer in zip(keys, questions, answers, strict=True)
        ]

    def _references(self, key: str, question: str) -> tuple[str, ...]:
        """What people answered to a question about an image."""
        return next(q.answers for q in self.by_key[key].questions if q.text == question and q.answers)

    def _write(self, step: int) -> None:
        folder = self.folder / "samples"
        (folder / "thumbs").mkdir(parents=True, exist_ok=True)
        for entry in self.last_samples:
            target = folder / entry["image"]
            if not target.exists():
                write_thumbnail(self.by_key[entry["key"]], target)
        write_json(folder / f"step-{step:06d}.json", self.last_samples)


class _Ranking:
    """All dev images and captions, ranked against each other; `rerank` keeps image features for ITM."""

    def __init__(self, model: Blip2, *, rerank: bool) -> None:
        self.model, self.rerank = model, rerank
        self.images: list[Tensor] = []
        self.features: list[Tensor] = []  # keys and values of an image are several times as large
        self.image_of_text: list[int] = []
        self.texts: list[str] = []
        self.count = 0

    def add(self, features_BPC: Tensor, captions: list[tuple[str, ...]]) -> None:
        """A batch of images; those without a caption, which have questions alone, are not ranked."""
        with_text = [n for n, texts in enumerate(captions) if texts]
        if not with_text:
            return
        features_BPC, captions = features_BPC[with_text], [captions[n] for n in with_text]
        self.images.append(self.model.embed_features(features_BPC))
        if self.rerank:
            self.features += features_BPC.to("cpu").split(1)
        for texts in captions:
            self.image_of_text += [self.count] * len(texts)
            self.texts += texts
            self.count += 1

    def recall(self) -> dict[str, float]:
        """Recall by ITC; with `rerank`, `recall` too: mean R@1 of both directions, re-ranked by ITM.

        Empty where fewer than two images have captions.
        """
        if self.count < 2:
            return {}
        texts_TE = self.model.embed_texts(self.texts)
        similarity_IT = to_numpy(query_text_similarity(torch.cat(self.images), texts_TE))
        numbers = recall_at_k(similarity_IT, self.image_of_text)
        if self.rerank:
            pairs = candidate_pairs(similarity_IT, RERANKED)
            matches = [(texts, self._itm(image, texts)) for image, texts in enumerate(pairs)]
            scores = reranked_scores(similarity_IT, matches, RERANKED, self.model.stage1.itc_scale)
            reranked = bidirectional_recall(*scores, self.image_of_text)
            numbers |= {f"reranked_{name}": reranked[name] for name in ("i2t_r1", "t2i_r1")}
            numbers["recall"] = (reranked["i2t_r1"] + reranked["t2i_r1"]) / 2
        return numbers

    def _itm(self, image: int, texts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """ITM's class-1 logits of an image with these texts."""
        image_kv = self.model.image_kv(self.features[image].to(self.model.device))
        logits: npt.NDArray[Any] = to_numpy(self.model.match_logits(image_kv, [self.texts[t] for t in texts])[:, 1])
        return logits


def _entry(key: str, text: str, references: Sequence[str]) -> dict[str, Any]:
    file_name = "".join(c if c.isalnum() or c in "-_." else "_" for c in key)
    return {"key": key, "image": f"thumbs/{file_name}.jpg", "caption": text, "references": list(references)}


def write_thumbnail(sample: Sample, target: Path) -> None:
    """Write a small JPEG of a sample for the report, unless the image can no longer be read."""
    try:
        image = read_images(sample, 1)[0]
    except BadSampleError:
        return
    image.thumbnail((THUMB, THUMB))
    image.save(target, "JPEG", quality=85)
