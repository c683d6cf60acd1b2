"""Is it the image side that limits captions? The ablation's linear projection on features that know what people said.

    python -m benchmarks.experiments.oracle_features --out runs/oracle

Every image's features are replaced by the mean of MiniLM's sentence embeddings of its five captions, on train and dev,
and the variant `linear` of `blip2 ablate tiny` is trained on them with the same budget. What it scores is not a result:
the captions are in the input. It says what this language model, frozen, learns to write in that budget from an image
side that is as good as people; the difference to the ablation's row is what the image side costs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.experiments.towers_alone import sentences
from blip2.configs import RunConfig
from blip2.data.collection import Collection
from blip2.data.feature_cache import FeatureCache
from blip2.data.images import ImageSpec
from blip2.data.sources import open_collection
from blip2.io.paths import cache_folder
from blip2.models.build import image_encoder
from blip2.recipes.ablations import variants
from blip2.training.run import train


def main() -> int:
    """Fill a feature cache of its own with embeddings of captions, then train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/oracle"))
    parser.add_argument("--steps", type=int, default=128, help="as `blip2 ablate --steps2` (default: %(default)s)")
    parser.add_argument("--images", type=int, default=250, help="dev images (default: %(default)s)")
    options = parser.parse_args()
    every_variant = variants(steps2=options.steps, images=options.images)
    config = next(variant.stage2 for variant in every_variant if variant.name == "linear")
    config = replace(config, recipe="oracle/linear", out=str(options.out))
    embedded = [
        (data, embeddings(config, data))
        for data in (open_collection("flickr8k:train"), open_collection("flickr8k:dev").limited(options.images))
    ]
    own = options.out.with_name(f"{options.out.name}-cache")
    own.mkdir(parents=True, exist_ok=True)
    towers = own / "towers"
    if not towers.exists():
        towers.symlink_to((cache_folder() / "towers").resolve(), target_is_directory=True)
    os.environ["BLIP2_CACHE"] = str(own)
    for data, rows in embedded:
        fill(config, data, rows)
    return train(config)


def embeddings(config: RunConfig, data: Collection) -> Tensor:
    """[I, D], the mean over each image's captions."""
    texts_TD, owners_T = sentences(config, data)
    return torch.stack([texts_TD[owners_T == n].mean(0) for n in range(len(data.samples))])


def fill(config: RunConfig, data: Collection, rows_ID: Tensor) -> None:
    """The cache that a run of `config` looks for, each patch of an image its row."""
    vision = image_encoder(config)
    rows: Iterator[Tensor] = iter(rows_ID)

    def encode(pixels: Tensor) -> Tensor:
        return torch.stack([next(rows).expand(vision.tokens, -1) for _ in pixels])

    FeatureCache.open_or_build(
        cache_folder() / "features",
        data,
        spec=ImageSpec(vision.size, vision.mean, vision.std, config.vision.resize),
        encoder_id=vision.id,
        encode=encode,
        views=config.data.cache_views,
        crop_min=config.data.crop_min,
        seed=config.train.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
