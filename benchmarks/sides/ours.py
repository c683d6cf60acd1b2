"""Our side of the claims about training and retrieval.

Shape letters: I images, T texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.worker import Side
from benchmarks.sides import ids, models
from blip2.configs import LossConfig, OptimConfig
from blip2.data.batch import Batch
from blip2.metrics.retrieval import candidate_pairs, reranked_scores
from blip2.models.stage1 import Stage1
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import autocast
from blip2.training.objectives.common import EarlyBackward
from blip2.training.objectives.stage1 import Stage1Objective
from blip2.training.optim import build_optimizer
from blip2.weights import names
from blip2.weights.loaded import cast

TEXTS_AT_ONCE = 128


def load_batch(settings: dict[str, Any]) -> Batch:
    """The inputs of a benchmark as a batch of ours."""
    stored = np.load(Path(settings["folder"]) / "inputs.npz")
    texts = [str(text) for text in stored["captions"]]
    return Batch(
        [str(n) for n in range(len(texts))],
        torch.arange(len(texts)),
        texts,
        features=torch.from_numpy(stored["features"]),
    ).to(torch.device(settings["device"]))


def stage1_objective(settings: dict[str, Any], *, one_sided: bool = True) -> EarlyBackward:
    """ITC (by default with LAVIS's one-sided gradient, so that gradients can be compared), ITM and ITG."""
    size = models.size_of(settings)
    model = models.read_stage1(settings["folder"], size).to(settings["device"])
    tokenizer: Any = ids.QFormerIds(size.words, size.max_text)
    return EarlyBackward(Stage1Objective(model, tokenizer, LossConfig(itc_one_sided=one_sided))).train()


def with_fixed_negatives(objective: EarlyBackward, batch: Batch) -> dict[str, Tensor]:
    """Our losses with the negatives of `ids.fixed_negatives`."""
    drawn = tuple(x.to(batch.image_ids.device) for x in ids.fixed_negatives(len(batch)))
    inner: Any = objective.objective
    inner._negatives = lambda *_: drawn
    try:
        losses: dict[str, Tensor] = objective(batch, 0)
    finally:
        del inner._negatives
    return losses


def stage1_step(settings: dict[str, Any]) -> Side:
    """One training step: losses, gradients, AdamW."""
    objective, batch = stage1_objective(settings), load_batch(settings)
    model, device = objective.model, torch.device(settings["device"])
    optimizer = build_optimizer(model.named_parameters(), OptimConfig())
    theirs = names.lavis(len(model.qformer.layers))

    def check() -> dict[str, np.ndarray]:
        with autocast(device, settings["precision"]):
            losses = with_fixed_negatives(objective, batch)
        torch.stack(list(losses.values())).sum().backward()
        stacked = torch.stack([losses[name] for name in ("itc", "itm", "itg")])
        out = {"losses": stacked.detach().float().cpu().numpy()}
        if settings["gradients"]:
            grads = {theirs[name]: p.grad for name, p in model.named_parameters() if p.grad is not None}
            out |= {name: grads[name].float().cpu().numpy() for name in ids.GRADIENTS}
            out["query_tokens"] = out["query_tokens"][None]
        optimizer.zero_grad()
        return out

    def run() -> None:
        with autocast(device, settings["precision"]):
            losses = objective(batch, 0)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side(run, check)


def rerank(settings: dict[str, Any]) -> Side:
    """ITC of all, ITM of the candidates of both directions grouped by image, for one of `share` processes."""
    size, batch = models.size_of(settings), load_batch(settings)
    model = cast(models.read_stage1(settings["folder"], size), models.weights_dtype(settings))
    model = model.to(settings["device"]).eval()
    assert batch.features is not None
    features = batch.features
    ids_TT, mask_TT = (x.to(settings["device"]) for x in ids.QFormerIds(size.words, 35)(batch.captions))
    mine = len(features) // settings["share"] + 1 if settings["share"] > 1 else len(features)  # as LAVIS shares

    @torch.no_grad()
    def scores() -> tuple[np.ndarray, np.ndarray]:
        with autocast(torch.device(settings["device"]), settings["precision"]):
            similarity_IT = _similarity(model, features, ids_TT, mask_TT, size.batch)
            pairs = candidate_pairs(similarity_IT, settings["k"])
            matches = [
                (chosen, _matches(model, features[n : n + 1], ids_TT[chosen], mask_TT[chosen]))
                for n, chosen in enumerate(pairs[:mine])
            ]
        return reranked_scores(similarity_IT, matches, settings["k"])

    def check() -> dict[str, np.ndarray]:
        return dict(zip(("i2t", "t2i"), scores(), strict=True))

    return Side(scores, check)


def _similarity(model: Stage1, features: Tensor, ids_TT: Tensor, mask_TT: Tensor, batch: int) -> np.ndarray:
    """ITC similarity [I, T]."""
    images = [model.embed_images(model.project_image(chunk))[0] for chunk in features.split(batch)]
    texts = [model.embed_texts(*part) for part in zip(ids_TT.split(256), mask_TT.split(256), strict=True)]
    similarity: np.ndarray = query_text_similarity(torch.cat(images), torch.cat(texts)).float().cpu().numpy()
    return similarity


def _matches(model: Stage1, features_1PC: Tensor, ids_NT: Tensor, mask_NT: Tensor) -> np.ndarray:
    """ITM scores of one image with its candidates: projected once."""
    kv = model.project_image(features_1PC)
    parts = zip(ids_NT.split(TEXTS_AT_ONCE), mask_NT.split(TEXTS_AT_ONCE), strict=True)
    logits: np.ndarray = torch.cat([model.match_logits(*part, kv)[:, 1] for part in parts]).float().cpu().numpy()
    return logits


def growth_step(settings: dict[str, Any]) -> Side:
    """`stage1_step` of ours, alone."""
    side = stage1_step(settings)
    return Side(side.run, dict)
