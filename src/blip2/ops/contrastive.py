"""Similarity of images and texts, ITC targets, and hard negatives for ITM.

Shape letters: B rows of this process, G rows of all processes, Q queries, E contrastive width.
"""

import torch
from torch import Tensor

from blip2.ops.devices import widened, without_autocast


def query_text_similarity(queries_BQE: Tensor, texts_GE: Tensor) -> Tensor:
    """Similarity [B, G] of images and texts: the largest dot product over the queries.

    Both sides are expected L2-normalised; the result is not yet divided by the temperature
    (arXiv 2301.12597, section 3.2: "the highest one as the image-text similarity"). It decides recall, what is
    re-ranked and which negatives are drawn, so the products are float32 inside autocast too.
    """
    B, Q, E = queries_BQE.shape
    with without_autocast(queries_BQE.device):
        sim_BQG = (widened(queries_BQE).reshape(B * Q, E) @ widened(texts_GE).t()).view(B, Q, -1)
    return sim_BQG.amax(dim=1)


def text_query_similarity(texts_BE: Tensor, queries_GQE: Tensor) -> Tensor:
    """Similarity [B, G] of texts and images: `query_text_similarity` seen from the texts."""
    return query_text_similarity(queries_GQE, texts_BE).t()


def itc_targets(ids_B: Tensor, ids_G: Tensor) -> Tensor:
    """Target distribution [B, G]: all pairs of the same image share the mass equally.

    Without repeated ids this is the identity at the row's own place.
    """
    same_BG = (ids_B[:, None] == ids_G[None, :]).float()
    return same_BG / same_BG.sum(dim=1, keepdim=True)


@torch.no_grad()
def sample_hard_negatives(logits_BG: Tensor, ids_B: Tensor, ids_G: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw one negative per row in proportion to softmax(logits), never one of the same image.

    One vectorised inverse-CDF draw, without a device synchronisation per row.

    Args:
        logits_BG: similarities already divided by the temperature.
        ids_B, ids_G: image id of every row and column; equal ids are positives.
        uniform_B: numbers in [0, 1), one per row; the draw is a pure function of them.

    Returns:
        [B] int64 column indices. A row whose every column is a positive (a batch of one image)
        has no negative: it gets -1.
    """
    positive_BG = ids_B[:, None] == ids_G[None, :]
    weights_BG = torch.softmax(logits_BG.double().masked_fill(positive_BG, -torch.inf), dim=1)
    # Far-away columns underflow to 0: a small floor keeps every negative reachable.
    weights_BG = (weights_BG.nan_to_num(0.0) + 1e-12).masked_fill(positive_BG, 0.0)
    cdf_BG = weights_BG.cumsum(dim=1)
    threshold_B1 = (uniform_B.double() * cdf_BG[:, -1]).unsqueeze(1)
    drawn_B = torch.searchsorted(cdf_BG, threshold_B1, right=True).squeeze(1)
    # Rounding can push the threshold past the last step: clamp to the last negative.
    columns = torch.arange(positive_BG.shape[1], device=positive_BG.device)
    last_B = torch.where(positive_BG, -1, columns).amax(dim=1)
    return torch.minimum(drawn_B, last_B)
