"""How well two frozen towers can be matched without a Q-Former: regularised CCA, in closed form.

    python benchmarks/towers_alone.py --images 1000

Pooled features of the image encoder ([CLS], mean, maximum and deviation over the patches) against the text
encoder's mean over tokens, fitted on Flickr8k train, measured on dev. Prints one JSON object per setting:
what a trained bridge of the same towers has to beat.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.cache import cache_folder
from blip2.configs import RunConfig
from blip2.data.features import FeatureCache
from blip2.data.images import ImageSpec
from blip2.data.samples import Collection
from blip2.data.sources import open_collection
from blip2.data.text import QFormerTokenizer
from blip2.evaluation.retrieval import recall_at_k
from blip2.models import towers
from blip2.models.build import image_encoder, load_qformer
from blip2.recipes import recipe

WIDTH = 256  # of the common space, as ITC's


def main() -> None:
    """Fit and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="dev images (default: %(default)s)")
    parser.add_argument("--ridge", type=float, nargs="+", default=[0.05, 0.2, 1.0], help="on the images' covariance")
    options = parser.parse_args()
    config = recipe("tiny/stage1")
    train, dev = open_collection("flickr8k:train"), open_collection("flickr8k:dev").limited(options.images)
    images, unseen = (pooled(config, data) for data in (train, dev))
    mean, deviation = images.mean(0), images.std(0)
    images, unseen = (images - mean) / deviation, (unseen - mean) / deviation
    (texts, owners), (queries, answers) = (sentences(config, data) for data in (train, dev))
    for ridge in options.ridge:
        common = cca(images[owners], texts, ridge)
        similarity = (
            F.normalize(unseen @ common[0], dim=1) @ F.normalize((queries - texts.mean(0)) @ common[1], dim=1).T
        )
        found = recall_at_k(similarity.numpy(), answers.numpy())
        print(json.dumps({"ridge": ridge, "images": len(dev.samples), **{k: round(v, 1) for k, v in found.items()}}))


def pooled(config: RunConfig, data: Collection) -> Tensor:
    """[I, 4C] of a data set, through its feature cache."""
    vision = image_encoder(config)
    cache = FeatureCache.open_or_build(
        cache_folder() / "features",
        data,
        spec=ImageSpec(vision.size, vision.mean, vision.std, config.vision.resize),
        encoder_id=vision.id,
        encode=torch.no_grad()(vision),
        views=1,
        crop_min=config.data.crop_min,
        seed=config.train.seed,
        rank=0,
    )
    features_IPC = torch.stack([cache.get([n], [0])[0].float() for n in range(len(data.samples))])
    patches = features_IPC[:, vision.prefix :]
    return torch.cat([features_IPC[:, 0], patches.mean(1), patches.amax(1), patches.std(1)], dim=1)


def sentences(config: RunConfig, data: Collection) -> tuple[Tensor, Tensor]:
    """[T, D] of all captions, the text branch's mean over tokens before any training, and their images' numbers."""
    settings = config.qformer
    branch = load_qformer(settings, 8, text=True).eval()
    branch.text_pool = "mean"
    tokenizer = QFormerTokenizer(towers.folder(settings.init), settings.max_text)
    captions = [caption for sample in data.samples for caption in sample.captions]
    owners = torch.tensor([n for n, sample in enumerate(data.samples) for _ in sample.captions])
    order = np.argsort([len(caption) for caption in captions])
    out = torch.empty(len(captions), branch.width)
    with torch.no_grad():
        for start in range(0, len(order), 256):
            chosen = order[start : start + 256]
            out[chosen] = F.normalize(branch.encode_text(*tokenizer([captions[n] for n in chosen])), dim=1)
            print(f"\r{start + len(chosen)}/{len(order)} captions", end="", file=sys.stderr)
    return out, owners


def cca(images_TX: Tensor, texts_TD: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Projections of both sides onto their `WIDTH` most correlated directions, weighted by the correlation."""
    texts_TD = texts_TD - texts_TD.mean(0)
    count = len(texts_TD)
    own_X = images_TX.T @ images_TX / count + ridge * torch.eye(images_TX.shape[1])
    own_D = texts_TD.T @ texts_TD / count
    own_D = own_D + 0.1 * own_D.diagonal().mean() * torch.eye(texts_TD.shape[1])
    left, right = whiten(own_X), whiten(own_D)
    U, S, V = torch.linalg.svd(left @ (images_TX.T @ texts_TD / count) @ right, full_matrices=False)
    return left @ U[:, :WIDTH] * S[:WIDTH], right @ V.T[:, :WIDTH] * S[:WIDTH]


def whiten(covariance: Tensor) -> Tensor:
    """The inverse square root."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=1e-9).rsqrt() @ vectors.T


if __name__ == "__main__":
    main()
