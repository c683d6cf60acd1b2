"""What a run measures of itself on dev: loss, recall, and captions of the same few images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blip2.configs import DecodingConfig, RunConfig
from blip2.data.batch import Batch
from blip2.data.collection import BadSampleError, Collection, Sample
from blip2.data.feature_cache import FeatureCache
from blip2.data.images import decode_image
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
        model: the run's model behind the same interface that users have.
        objective: gives the dev loss, on the first caption of each image.
        collection: dev images, already limited.
        features: cached features of the same collection, or None.
        folder: run folder; captions go to `samples/step-N.json`.
    """

    def __init__(
        self,
        model: Blip2,
        objective: nn.Module,
        collection: Collection,
        features: FeatureCache | None,
        config: RunConfig,
        folder: Path,
    ) -> None:
        self.model, self.objective, self.config, self.folder = model, objective, config, folder
        self.collection, self.features = collection, features
        self.by_key = {sample.key: sample for sample in collection.samples}
        self.last_samples: list[dict[str, Any]] = []
        self.first = distributed.rank() == 0  # every process measures, the first one writes

    def __call__(self, step: int) -> dict[str, Any]:
        """Dev numbers: mean losses, ITC recall (stage 1), the one that the run goes by; and two sample captions.

        The captions (or answers) of the sample images are written.
        """
        settings, losses = self.config.eval, _Means()
        pool = _Pool()
        shown: list[dict[str, Any]] = []
        wanted = self.config.eval.images if settings.best in METRICS else settings.samples
        for batch in self._batches():
            features = self._features(batch)
            batch.features, batch.pixels = features, None
            if len(batch) > 1:
                losses.add({k: float(v) for k, v in self.objective(batch, 0).items()})
            if self.config.stage == "stage1":
                pool.add(self.model, features, [self.by_key[key].captions for key in batch.keys], settings.best)
            missing = wanted - len(shown)
            if missing > 0:
                shown += self._texts(batch, features, missing)
        numbers: dict[str, Any] = losses.means()
        if pool.images:
            numbers |= pool.recall(self.model)
        if settings.best in METRICS and shown:
            texts = [entry.get("answer", entry["caption"]) for entry in shown]
            numbers |= measure([settings.best], texts, [entry["references"] for entry in shown])
        self._write(step, shown[: settings.samples])
        numbers["captions"] = [f"{entry['key']}: {entry['caption']}" for entry in shown[:2]]
        return numbers

    def _batches(self) -> Iterator[Batch]:
        # of stage 1 the losses depend on it (negatives); captions come faster when many are decoded at a time
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
        batch.image_ids = batch.image_ids.to(self.model.device)
        if batch.features is not None:
            return batch.features.to(self.model.device)
        assert batch.pixels is not None
        with torch.no_grad():
            return self.model.vision(batch.pixels.to(self.model.device))

    def _texts(self, batch: Batch, features_BPC: Tensor, count: int) -> list[dict[str, Any]]:
        """What the model says of the first `count` images of a batch, beside what people said."""
        keys, features, limits = batch.keys[:count], features_BPC[:count], self.config.eval
        if batch.questions is not None:
            asked = batch.questions[:count]
            decoding = DecodingConfig.for_answers(beams=limits.beams)
            prompts = [self.config.language.question.format(question) for question in asked]
            texts = self.model.generate(features, prompts, decoding, questions=asked)
            said = [f"{question} {text[0]}" for question, text in zip(asked, texts, strict=True)]
            answers = [self._answers(key, question) for key, question in zip(keys, asked, strict=True)]
            return [
                {**_entry(key, line, found), "answer": text[0]}
                for key, line, text, found in zip(keys, said, texts, answers, strict=True)
            ]
        decoding = DecodingConfig(beams=limits.beams, min_tokens=limits.min_tokens, max_tokens=limits.max_tokens)
        texts = self.model.caption_features(features, None, decoding)
        return [_entry(key, text[0], self.by_key[key].captions) for key, text in zip(keys, texts, strict=True)]

    def _answers(self, key: str, question: str) -> tuple[str, ...]:
        return next(q.answers for q in self.by_key[key].questions if q.text == question and q.answers)

    def _write(self, step: int, shown: list[dict[str, Any]]) -> None:
        self.last_samples = shown
        if not self.first or not shown:
            return
        folder = self.folder / "samples"
        (folder / "thumbs").mkdir(parents=True, exist_ok=True)
        for entry in shown:
            target = folder / entry["image"]
            if not target.exists():
                write_thumbnail(self.by_key[entry["key"]], target)
        write_json(folder / f"step-{step:06d}.json", shown)


class _Means:
    """Means of named numbers."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def add(self, line: dict[str, float]) -> None:
        self.lines.append(line)

    def means(self) -> dict[str, float]:
        if not self.lines:
            return {}
        means = {name: float(np.mean([line[name] for line in self.lines])) for name in self.lines[0]}
        return {"loss": sum(means.values()), **means}


class _Pool:
    """All dev images and their captions, to rank among each other."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.features: list[Tensor] = []  # keys and values of an image are several times as large
        self.owners: list[int] = []
        self.texts: list[str] = []
        self.count = 0

    def add(self, model: Blip2, features_BPC: Tensor, captions: list[tuple[str, ...]], best: str | None) -> None:
        self.images.append(model.embed_features(features_BPC))
        if best == "recall":
            self.features += features_BPC.to("cpu").split(1)
        for found in captions:
            self.owners += [self.count] * len(found)
            self.texts += found
            self.count += 1

    def recall(self, model: Blip2) -> dict[str, float]:
        """Recall by ITC; where features were kept, `recall` too: mean R@1 of both directions, re-ranked by ITM."""
        owners = np.array(self.owners)
        similarity_IT = to_numpy(query_text_similarity(torch.cat(self.images), model.embed_texts(self.texts)))
        numbers = recall_at_k(similarity_IT, owners)
        if self.features:
            matches = [
                (texts, self._itm(model, image, texts))
                for image, texts in enumerate(candidate_pairs(similarity_IT, RERANKED))
            ]
            found = bidirectional_recall(
                *reranked_scores(similarity_IT, matches, RERANKED, model.stage1.itc_scale), owners
            )
            numbers |= {f"reranked_{name}": found[name] for name in ("i2t_r1", "t2i_r1")}
            numbers["recall"] = (found["i2t_r1"] + found["t2i_r1"]) / 2
        return numbers

    def _itm(self, model: Blip2, image: int, texts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """ITM's class-1 logits of an image with these texts."""
        kv = model.image_kv(self.features[image].to(model.device))
        found: npt.NDArray[Any] = to_numpy(model.match_logits(kv, [self.texts[t] for t in texts])[:, 1])
        return found


def _entry(key: str, text: str, references: Sequence[str]) -> dict[str, Any]:
    return {"key": key, "image": f"thumbs/{_file_name(key)}.jpg", "caption": text, "references": list(references)}


def write_thumbnail(sample: Sample, target: Path) -> None:
    """A small JPEG of a sample, for the report; nothing where the image cannot be read any more."""
    try:
        picture = decode_image(sample.read())
    except BadSampleError:
        return
    picture.thumbnail((THUMB, THUMB))
    picture.save(target, "JPEG", quality=85)


def _file_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in key)
