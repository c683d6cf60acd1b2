"""How well two frozen towers can be matched without a Q-Former: regularised CCA, in closed form.

    python -m benchmarks.experiments.towers_alone --images 1000
    python -m benchmarks.experiments.towers_alone --images 1000 --layers 4 6 8 10 11 12

Pooled features of the image encoder ([CLS], mean, maximum and deviation over the patches) against the text
encoder's mean over tokens, fitted on Flickr8k train, measured on dev; then the same two linear maps trained by
ITC, from random weights and from CCA's. Prints one JSON object per setting: what a trained Q-Former of the same
towers has to beat. With `--layers` CCA alone, for the output of each of these blocks of the image encoder, with
its patches and with their averages over 2 x 2 as the recipes have them: nothing is cached.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from blip2.configs import RunConfig
from blip2.data.collection import Collection
from blip2.data.feature_cache import FeatureCache
from blip2.data.images import ImageSpec, decode_image, plain_view
from blip2.data.sources import open_collection
from blip2.data.tokenizers import QFormerTokenizer
from blip2.io.paths import cache_folder
from blip2.metrics.retrieval import recall_at_k
from blip2.models import towers
from blip2.models.build import image_encoder, load_qformer
from blip2.recipes import recipe

WIDTH = 256  # of the common space, as ITC's
BATCH = 96


def main() -> None:
    """Fit and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="dev images (default: %(default)s)")
    parser.add_argument("--ridge", type=float, nargs="+", default=[0.05, 0.2, 1.0], help="on the images' covariance")
    parser.add_argument("--layers", type=int, nargs="+", help="blocks of the image encoder, from 1")
    parser.add_argument("--train", type=int, help="train images (default: all)")
    options = parser.parse_args()
    config = recipe("tiny/stage1")
    train = open_collection("flickr8k:train").limited(options.train)
    dev = open_collection("flickr8k:dev").limited(options.images)
    if options.layers:
        compare_layers(config, train, dev, options.layers, options.ridge)
        return
    images, unseen = (pooled(config, data) for data in (train, dev))
    mean, deviation = images.mean(0), images.std(0)
    images, unseen = (images - mean) / deviation, (unseen - mean) / deviation
    (texts, owners), (queries, answers) = (sentences(config, data) for data in (train, dev))
    texts, queries = (side - texts.mean(0) for side in (texts, queries))
    fitted = {ridge: cca(images[owners], texts, ridge) for ridge in options.ridge}
    torch.manual_seed(0)
    random = [torch.randn(side.shape[1], WIDTH) / side.shape[1] ** 0.5 for side in (images, texts)]
    middle = fitted[sorted(fitted)[len(fitted) // 2]]
    trained = {
        "ITC from random weights": itc(images, texts, owners, random, lr=1e-3),
        "ITC from CCA": itc(images, texts, owners, middle, lr=3e-4),
    }
    for name, (left, right) in {**{f"CCA, ridge {ridge}": maps for ridge, maps in fitted.items()}, **trained}.items():
        similarity = F.normalize(unseen @ left, dim=1) @ F.normalize(queries @ right, dim=1).T
        recall = recall_at_k(similarity.numpy(), answers.numpy())
        print(json.dumps({"maps": name, "images": len(dev.samples), **{k: round(v, 1) for k, v in recall.items()}}))


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


def compare_layers(
    config: RunConfig, train: Collection, dev: Collection, layers: Sequence[int], ridges: Sequence[float]
) -> None:
    """CCA's recall for each block; of the ridges the best, since each block has another scale."""
    (texts, owners), (queries, answers) = (sentences(config, data) for data in (train, dev))
    texts, queries = (side - texts.mean(0) for side in (texts, queries))
    known, asked = (by_layer(config, data, layers) for data in (train, dev))
    for name in known:
        mean, deviation = known[name].mean(0), known[name].std(0).clamp(min=1e-6)
        images, unseen = ((side[name] - mean) / deviation for side in (known, asked))
        best: dict[str, float] = {}
        for ridge in ridges:
            left, right = cca(images[owners], texts, ridge)
            similarity = F.normalize(unseen @ left, dim=1) @ F.normalize(queries @ right, dim=1).T
            recall = recall_at_k(similarity.numpy(), answers.numpy()) | {"ridge": ridge}
            best = max(best, recall, key=lambda scores: scores.get("i2t_r1", -1) + scores.get("t2i_r1", 0))
        print(json.dumps({"layer": name, "images": len(dev.samples), **{k: round(v, 2) for k, v in best.items()}}))


@torch.no_grad()
def by_layer(config: RunConfig, data: Collection, layers: Sequence[int]) -> dict[str, Tensor]:
    """[I, 4C] of every block, of its patches and of their averages over 2 x 2."""
    vision = image_encoder(config)
    spec = ImageSpec(vision.size, vision.mean, vision.std, config.vision.resize)
    rows: dict[str, list[Tensor]] = {}
    for start in tqdm(range(0, len(data.samples), 32), desc="images", mininterval=20.0):
        views = [plain_view(decode_image(sample.read()), spec) for sample in data.samples[start : start + 32]]
        states = vision.model(pixel_values=torch.stack(views), output_hidden_states=True).hidden_states
        for layer in layers:
            whole_BPC = vision.model.layernorm(states[layer])  # type: ignore[operator]
            first_BC, patches_BPC = whole_BPC[:, 0], whole_BPC[:, vision.prefix :]
            grid_BCGG = patches_BPC.transpose(1, 2).unflatten(2, (vision.grid, vision.grid))
            pooled_BPC = F.avg_pool2d(grid_BCGG, 2).flatten(2).transpose(1, 2)
            for name, features in ((f"{layer}", patches_BPC), (f"{layer}, 2 x 2", pooled_BPC)):
                parts = [first_BC, features.mean(1), features.amax(1), features.std(1)]
                rows.setdefault(name, []).append(torch.cat(parts, dim=1))
    return {name: torch.cat(parts) for name, parts in rows.items()}


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


def itc(
    images_IX: Tensor, texts_TD: Tensor, owners_T: Tensor, start: Sequence[Tensor], *, lr: float, epochs: int = 10
) -> list[Tensor]:
    """Linear maps trained by symmetric cross-entropy, 96 images with a random caption each at a time."""
    scale = texts_TD.std()
    maps = [start[0].clone().requires_grad_(), (start[1] * scale).requires_grad_()]
    log_temperature = torch.tensor(0.05).log().requires_grad_()
    optimizer = torch.optim.AdamW([*maps, log_temperature], lr=lr, weight_decay=0.1)
    of_image = [(owners_T == n).nonzero()[:, 0] for n in range(len(images_IX))]
    steps = epochs * (len(images_IX) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=20 / steps)
    order = torch.cat([torch.randperm(len(images_IX))[: len(images_IX) // BATCH * BATCH] for _ in range(epochs)])
    for batch in order.split(BATCH):
        drawn = torch.stack([of_image[n][torch.randint(len(of_image[n]), ())] for n in batch.tolist()])
        left = F.normalize(F.dropout(images_IX[batch], 0.2) @ maps[0], dim=1)
        right = F.normalize(texts_TD[drawn] / scale @ maps[1], dim=1)
        logits, own = left @ right.T / log_temperature.exp(), torch.arange(len(batch))
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [maps[0].detach(), maps[1].detach() / scale]


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
