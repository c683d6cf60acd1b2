"""What a `tiny/stage1` + `tiny/stage2` run on Flickr8k gives, measured on dev.

    python benchmarks/experiments/flickr8k_tiny.py runs/s1 runs/s2 --images 1000 --out docs/results/flickr8k-tiny.json

Prints one JSON object: ITC recall of stage 1, caption metrics of stage 2, the same captions scored
against another image's references (the shuffled-image check), time per step, and sample captions.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import blip2
from blip2.configs import DecodingConfig
from blip2.data.collection import Collection
from blip2.data.feature_cache import FeatureCache
from blip2.data.loader import dev_batches
from blip2.data.sources import open_collection
from blip2.inference import Blip2
from blip2.io.paths import cache_folder
from blip2.metrics.captioning import bleu, cider
from blip2.metrics.retrieval import recall_at_k
from blip2.ops.contrastive import query_text_similarity


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage1", type=Path)
    parser.add_argument("stage2", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="dev images (default: all 1,000)")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dev = open_collection("flickr8k:dev").limited(options.images)
    first, second = blip2.load(options.stage1), blip2.load(options.stage2)
    features = dev_features(first, dev)
    began = time.monotonic()
    captions = captions_of(second, dev, features, DecodingConfig(beams=options.beams))
    references = [list(sample.captions) for sample in dev.samples]
    result = {
        "images": len(dev.samples),
        "chance_r1_percent": round(100 / len(dev.samples), 3),
        "stage1": {"run": run_facts(options.stage1), "itc": rounded(retrieval(first, dev, features))},
        "stage2": {
            "run": run_facts(options.stage2),
            "beams": options.beams,
            "seconds_per_caption": round((time.monotonic() - began) / len(captions), 3),
            "cider": round(cider(captions, references), 2),
            **rounded(bleu(captions, references)),
            "shuffled_image_check_cider": rounded(shuffled_image_check(captions, references, seed=0)),
            "distinct_captions": len(set(captions)),
        },
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "samples": [
            {"key": sample.key, "caption": caption, "reference": sample.captions[0]}
            for sample, caption in list(zip(dev.samples, captions, strict=True))[:: max(1, len(captions) // 20)]
        ],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", "utf-8")


def shuffled_image_check(captions: list[str], references: list[list[str]], seed: int = 0) -> dict[str, float]:
    """CIDEr in percent against the `right` image's references and another's (`shuffled`): do captions see the image?

    Captions that ignore their image score about the same on both sides; two or more images.
    """
    other = [references[n] for n in derangement(len(captions), seed)]
    return {"right": cider(captions, references), "shuffled": cider(captions, other)}


def derangement(count: int, seed: int) -> list[int]:
    """A seeded permutation of `count` (2 or more) indices that leaves none in place: one random cycle."""
    order = np.random.default_rng(seed).permutation(count)
    result = np.empty(count, dtype=np.int64)
    result[order] = np.roll(order, 1)
    return [int(i) for i in result]


def dev_features(model: Blip2, dev: Collection) -> FeatureCache:
    """Frozen features of dev, encoded once."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return model.vision(pixels)

    folder = cache_folder() / "features"
    return FeatureCache.open_or_build(folder, dev, spec=model.image_spec, encoder_id=model.vision.id, encode=encode)


def captions_of(model: Blip2, dev: Collection, features: FeatureCache, decoding: DecodingConfig) -> list[str]:
    """One caption per dev image."""
    predictions: list[str] = []
    for batch in dev_batches(dev, batch=16, spec=None, features=features):
        assert batch.features is not None
        predictions += [texts[0] for texts in model.caption_features(batch.features, None, decoding)]
        print(f"\r{len(predictions)}/{len(dev.samples)} captions", end="", flush=True, file=sys.stderr)
    return predictions


def retrieval(model: Blip2, dev: Collection, features: FeatureCache) -> dict[str, float]:
    """ITC recall over all dev images and all their captions."""
    images = [
        model.embed_features(batch.features)
        for batch in dev_batches(dev, batch=64, spec=None, features=features)
        if batch.features is not None
    ]
    texts = [caption for sample in dev.samples for caption in sample.captions]
    owners = np.array([n for n, sample in enumerate(dev.samples) for _ in sample.captions])
    return recall_at_k(query_text_similarity(torch.cat(images), model.embed_texts(texts)).numpy(), owners)


def run_facts(run: Path) -> dict[str, Any]:
    """Steps, losses and seconds per step of a run, from its own record."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    train, dev = ([line for line in lines if line["kind"] == kind] for kind in ("train", "dev"))
    names = [name for name in ("loss", "itc", "itm", "itg", "lm") if name in train[-1]]
    last = train[-20:]
    return {
        "steps": train[-1]["step"],
        "first": {name: round(train[0][name], 3) for name in names},
        "last_20_mean": {name: round(statistics.fmean(line[name] for line in last), 3) for name in names},
        "dev": [{k: round(v, 3) for k, v in line.items() if k != "kind"} for line in dev],
        "median_seconds_per_step": round(statistics.median(line["time"] for line in train), 2),
        "data_wait_share": round(
            sum(line["data_wait"] * line["time"] for line in train) / sum(line["time"] for line in train), 4
        ),
        "core_hours": round(2 * sum(line["time"] for line in train) / 3600, 2),
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Two digits."""
    return {name: round(value, 2) for name, value in values.items()}


if __name__ == "__main__":
    main()
