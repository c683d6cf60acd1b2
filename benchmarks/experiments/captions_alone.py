"""What the image encoder knows of captions without a Q-Former or a language model: captions of the nearest images.

    python -m benchmarks.experiments.captions_alone --images 1000

For every dev image of Flickr8k, the captions of its K most similar train images compete, and the one that agrees
most with the others (cosine of MiniLM's means over tokens) is taken: consensus caption retrieval (Devlin et al.,
arXiv 1505.04467). Similar by the frozen encoder's pooled features as they are, or by their CCA with captions.
Beside it, what a person's caption scores against the other four of its image, and what the best of the candidates
would (chosen by its score, so a bound, not a method). Prints one JSON object per row; blip2's own scorers.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.experiments.towers_alone import cca, pooled, sentences
from blip2.data.sources import open_collection
from blip2.metrics.captioning import bleu, cider, cider_per_image
from blip2.recipes import recipe


def main() -> None:
    """Fit, retrieve and score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="dev images (default: %(default)s)")
    parser.add_argument("--nearest", type=int, nargs="+", default=[1, 10, 30, 60], help="train images that compete")
    parser.add_argument("--bound", type=int, default=10, help="nearest images whose best caption is the bound")
    options = parser.parse_args()
    config = recipe("tiny/stage1")
    train, dev = open_collection("flickr8k:train"), open_collection("flickr8k:dev").limited(options.images)
    images, unseen = (pooled(config, data) for data in (train, dev))
    mean, deviation = images.mean(0), images.std(0)
    images, unseen = (images - mean) / deviation, (unseen - mean) / deviation
    texts, owners = sentences(config, train)
    captions = [caption for sample in train.samples for caption in sample.captions]
    references = [sample.captions for sample in dev.samples]
    show("a person's caption against the other four", [r[0] for r in references], [r[1:] for r in references])
    left, _ = cca(images[owners], texts - texts.mean(0), 0.2)
    of_image = grouped(owners, len(train.samples))
    for name, (known, asked) in {
        "pooled features": (images, unseen),
        "their CCA with captions": (images @ left, unseen @ left),
    }.items():
        near_IK = (F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T).topk(max(options.nearest)).indices
        for count in options.nearest:
            chosen = [consensus(texts, [t for n in row[:count].tolist() for t in of_image[n]]) for row in near_IK]
            show(f"consensus of {count} nearest by {name}", [captions[t] for t in chosen], references)
    rows = [[captions[t] for n in row[: options.bound].tolist() for t in of_image[n]] for row in near_IK]
    width = min(map(len, rows))
    scores = torch.tensor([cider_per_image([row[n] for row in rows], references) for n in range(width)])
    best = [row[n] for row, n in zip(rows, scores.argmax(0).tolist(), strict=True)]
    show(f"bound: the best caption of {options.bound} nearest by their CCA with captions", best, references)


def grouped(owners_T: Tensor, images: int) -> list[list[int]]:
    """The numbers of every image's captions."""
    grouped: list[list[int]] = [[] for _ in range(images)]
    for text, owner in enumerate(owners_T.tolist()):
        grouped[owner].append(text)
    return grouped


def consensus(texts_TD: Tensor, candidates: list[int]) -> int:
    """The candidate that is most similar to all of them."""
    own = F.normalize(texts_TD[candidates], dim=1)
    return candidates[int(torch.argmax((own @ own.T).mean(1)))]


def show(name: str, predictions: list[str], references: list[tuple[str, ...]]) -> None:
    """Print a row's scores."""
    scores = {"cider": cider(predictions, references), **bleu(predictions, references)}
    print(json.dumps({"captions": name, "images": len(predictions), **{k: round(v, 1) for k, v in scores.items()}}))


if __name__ == "__main__":
    main()
