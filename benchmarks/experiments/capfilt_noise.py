"""Does the ranker find wrong captions? Half of the captions replaced by another image's.

    python benchmarks/experiments/capfilt_noise.py runs/s1 --data flickr8k:dev --images 300
    python benchmarks/experiments/capfilt_noise.py runs/s1 --captioner runs/s2 --images 40

Prints one JSON object. A caption counts as called wrong when
- `itc_median`: its ITC similarity is in the lower half (half of them are wrong, which is known here);
- `itm_0.5`: ITM finds a match less likely than 0.5 (BLIP's rule, which needs to know nothing);
- `rank`: it is not among the best two of itself and ten drawn captions (what CapFilt keeps; with --captioner).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import blip2
from blip2.capfilt.choose import WEB, choose, pool
from blip2.capfilt.models import Blip2Model
from blip2.capfilt.settings import CapFiltSettings
from blip2.data.collection import Sample
from blip2.data.images import decode_image
from blip2.data.sources import open_collection

BATCH = 16


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranker", help="a stage-1 run")
    parser.add_argument("--data", default="flickr8k:train")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--captioner", help="a stage-2 run: measures the whole of CapFilt too, which takes longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    samples, captions, wrong = noisy(options.data, options.images, options.seed)
    settings = CapFiltSettings(options.captioner or options.ranker, options.ranker)
    ranker = Blip2Model(blip2.load(options.ranker), settings)
    captioner = Blip2Model(blip2.load(options.captioner), settings) if options.captioner else None
    began = time.monotonic()
    itc, itm, keeps = judged(samples, captions, ranker, captioner, settings)
    calls = {"itc_median": itc < np.median(itc), "itm_0.5": itm < 0.5}
    if captioner is not None:
        calls["rank"] = ~keeps
    result: dict[str, Any] = {
        "data": options.data,
        "images": len(samples),
        "wrong": int(wrong.sum()),
        "itc_auc": round(area_under_curve(-itc, wrong), 4),
        "itm_auc": round(area_under_curve(-itm, wrong), 4),
        **{name: precision_recall(called, wrong) for name, called in calls.items()},
        "seconds_per_image": round((time.monotonic() - began) / len(samples), 3),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def noisy(spec: str, images: int, seed: int) -> tuple[list[Sample], list[str], np.ndarray]:
    """Images drawn from a data set, a caption each, and which of them are another image's (half)."""
    rng = np.random.default_rng(seed)
    collection = open_collection(spec)
    drawn = rng.permutation(len(collection.samples))[:images]
    samples = [collection.samples[n] for n in drawn]
    captions = [sample.captions[int(rng.integers(len(sample.captions)))] for sample in samples]
    moved = rng.permutation(len(samples))[: len(samples) // 2]
    noisy_captions = list(captions)
    for own, other in zip(moved, np.roll(moved, 1), strict=True):  # a cycle: nobody keeps its own
        noisy_captions[own] = captions[other]
    wrong = np.zeros(len(samples), bool)
    wrong[moved] = True
    return samples, noisy_captions, wrong


def judged(
    samples: Sequence[Sample],
    captions: Sequence[str],
    ranker: Blip2Model,
    captioner: Blip2Model | None,
    settings: CapFiltSettings,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ITC similarity and ITM probability of each caption, and whether CapFilt keeps it beside drawn ones."""
    itc: list[float] = []
    itm: list[float] = []
    keeps: list[bool] = []
    for start in range(0, len(samples), BATCH):
        images = [decode_image(sample.read()) for sample in samples[start : start + BATCH]]
        own = list(captions[start : start + BATCH])
        itm += [values[0] for values in ranker.matches(images, [[text] for text in own])]
        torch.manual_seed(start)
        prompts = [settings.prompt_for({})] * len(images)
        drawn = captioner.captions(images, prompts, settings.samples) if captioner else [[] for _ in own]
        pools = [pool([text], texts) for text, texts in zip(own, drawn, strict=True)]
        scores = ranker.scores(images, [[one.text for one in candidates] for candidates in pools])
        itc += [values[0] for values in scores]
        for candidates, values in zip(pools, scores, strict=True):
            texts = [replace(one, score=value) for one, value in zip(candidates, values, strict=True)]
            best, _ = choose(texts, settings.keep, None)
            keeps.append(any(one.source == WEB for one in best))
    return np.array(itc), np.array(itm), np.array(keeps)


def precision_recall(called: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Of the captions called wrong, the share that is; of the wrong ones, the share that was called so."""
    hit = float((called & wrong).sum())
    return {
        "precision": round(hit / max(int(called.sum()), 1), 4),
        "recall": round(hit / max(int(wrong.sum()), 1), 4),
        "called": int(called.sum()),
    }


def area_under_curve(values: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a wrong caption has a larger value than a right one."""
    ahead = values[wrong][:, None] - values[~wrong][None, :]
    return float((ahead > 0).mean() + 0.5 * (ahead == 0).mean())


if __name__ == "__main__":
    main()
