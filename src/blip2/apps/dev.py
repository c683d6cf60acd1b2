"""What a run measures of itself on dev: loss, recall, and captions of the same few images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blip2.configs import DecodingConfig, RunConfig
from blip2.data.dataset import Batch, dev_batches
from blip2.data.features import FeatureCache
from blip2.data.images import decode_image
from blip2.data.samples import BadSampleError, Collection, Sample
from blip2.evaluation.retrieval import recall_at_k
from blip2.inference import Blip2
from blip2.ops import distributed
from blip2.ops.contrastive import query_text_similarity

THUMB = 224


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
        """Dev numbers: mean losses, ITC recall (stage 1); writes the sample captions, and shows two."""
        numbers: dict[str, Any] = {}
        losses: list[dict[str, float]] = []
        images: list[Tensor] = []
        owners: list[int] = []
        texts: list[str] = []
        seen = 0
        shown: list[dict[str, Any]] = []
        for batch in self._batches():
            pixels_or_features = self._features(batch)
            batch.features, batch.pixels = pixels_or_features, None
            if len(batch) > 1:
                losses.append({k: float(v) for k, v in self.objective(batch, 0).items()})
            if self.config.stage == "stage1":
                images.append(self.model.embed_features(pixels_or_features))
                for key in batch.keys:
                    captions = self.by_key[key].captions
                    owners += [seen] * len(captions)
                    texts += captions
                    seen += 1
            missing = self.config.eval.samples - len(shown)
            if missing > 0:
                shown += self._captions(batch.keys[:missing], pixels_or_features[:missing])
        if losses:
            means = {k: float(np.mean([line[k] for line in losses])) for k in losses[0]}
            numbers |= {"loss": sum(means.values()), **means}
        if images:
            scores = query_text_similarity(torch.cat(images), self.model.embed_texts(texts))
            numbers |= recall_at_k(scores.numpy(), np.array(owners))
        self._write(step, shown)
        numbers["captions"] = [f"{entry['key']}: {entry['caption']}" for entry in shown[:2]]
        return numbers

    def _batches(self) -> Iterator[Batch]:
        size = min(64, self.config.train.batch)
        return dev_batches(self.collection, batch=size, spec=self.model.image_spec, features=self.features)

    def _features(self, batch: Batch) -> Tensor:
        batch.image_ids = batch.image_ids.to(self.model.device)
        if batch.features is not None:
            return batch.features.to(self.model.device)
        assert batch.pixels is not None
        with torch.no_grad():
            return self.model.vision(batch.pixels.to(self.model.device))

    def _captions(self, keys: list[str], features_BPC: Tensor) -> list[dict[str, Any]]:
        limits = self.config.eval
        decoding = DecodingConfig(beams=limits.beams, min_tokens=limits.min_tokens, max_tokens=limits.max_tokens)
        texts = self.model.caption_features(features_BPC, None, decoding)
        return [
            {
                "key": key,
                "image": f"thumbs/{_file_name(key)}.jpg",
                "caption": text[0],
                "references": list(self.by_key[key].captions),
            }
            for key, text in zip(keys, texts, strict=True)
        ]

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
        beside = folder / f".step-{step:06d}.tmp"
        beside.write_text(json.dumps(shown, indent=1), "utf-8")
        beside.replace(folder / f"step-{step:06d}.json")


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
