"""Recall@k and median rank of image-text retrieval, from a table of scores; numpy only.

Shapes: I images, T texts; an image has one text or several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def retrieval_ranks(
    scores_IT: npt.NDArray[Any], image_of_text_T: npt.ArrayLike
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rank of the first right answer for each image and for each text, 1 is best.

    Ties count against us: a wrong candidate with the same score stands before the right one, so
    a constant table ranks last instead of first. An image's other texts are right, never ahead.

    Args:
        scores_IT: score of every pair, higher is more alike; -inf marks a pair never considered.
        image_of_text_T: row of the image that each text describes.

    Returns:
        ranks of images among T texts, shape (I,), and of texts among I images, shape (T,).

    Raises:
        ValueError: shapes disagree, an index is out of range, an image has no text, a score is NaN.
    """
    scores_IT = np.asarray(scores_IT)
    owner_T = _checked(scores_IT, image_of_text_T)
    own_IT = owner_T[None, :] == np.arange(len(scores_IT))[:, None]
    best_I = np.where(own_IT, scores_IT, -np.inf).max(axis=1)
    ahead_I = ((scores_IT >= best_I[:, None]) & ~own_IT).sum(axis=1)
    right_T = scores_IT[owner_T, np.arange(len(owner_T))]
    ahead_T = ((scores_IT >= right_T[None, :]) & ~own_IT).sum(axis=0)
    return ahead_I + 1, ahead_T + 1


def recall_at_k(
    scores_IT: npt.NDArray[Any], image_of_text_T: npt.ArrayLike, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k and median rank in both directions; recall in percent.

    An image counts as right when any of its texts is among the k best. Ties are
    counted pessimistically, see `retrieval_ranks`.

    Args:
        scores_IT: score of every pair, higher is more alike.
        image_of_text_T: row of the image that each text describes.
        ks: depths of the ranking.

    Returns:
        `i2t_r{k}` and `t2i_r{k}` for each k, `i2t_median_rank`, `t2i_median_rank`.

    Raises:
        ValueError: as `retrieval_ranks`, or a k below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {tuple(ks)}: it must hold one or more numbers of 1 or more")
    image_rank_I, text_rank_T = retrieval_ranks(scores_IT, image_of_text_T)
    result: dict[str, float] = {}
    for direction, ranks in (("i2t", image_rank_I), ("t2i", text_rank_T)):
        result |= {f"{direction}_r{k}": 100.0 * float((ranks <= k).mean()) for k in ks}
    result["i2t_median_rank"] = float(np.median(image_rank_I))
    result["t2i_median_rank"] = float(np.median(text_rank_T))
    return result


def candidate_pairs(similarity_IT: npt.NDArray[Any], k: int) -> list[npt.NDArray[np.int64]]:
    """Texts to match with each image: its `k` best, and those among whose `k` best images it is."""
    by_image_IT, by_text_IT = _best(similarity_IT, k)
    return [np.flatnonzero(row) for row in by_image_IT | by_text_IT]


def reranked_scores(
    similarity_IT: npt.NDArray[Any],
    matches: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]],
    k: int,
    itc_weight: float = 1.0,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Scores of both directions [I, T]: ITC + ITM within the `k` best, minus infinity beyond.

    Args:
        matches: per image, the texts of `candidate_pairs` and their ITM logits.
        itc_weight: of the ITC similarity; 1 is what LAVIS adds, 1 / temperature puts it on the
            scale of the logits that it was trained as.

    Returns:
        scores for finding texts by image, and images by text.
    """
    total_IT = np.full(similarity_IT.shape, -np.inf, dtype=np.float32)
    for row, (texts, logits) in enumerate(matches):
        total_IT[row, texts] = itc_weight * similarity_IT[row, texts] + logits
    by_image_IT, by_text_IT = _best(similarity_IT, k)
    return np.where(by_image_IT, total_IT, -np.inf), np.where(by_text_IT, total_IT, -np.inf)


def fill_with_similarity(scores_IT: npt.NDArray[Any], similarity_IT: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Scores in which the pairs that have none (minus infinity) stand below all others, as ITC ranks them."""
    scored_IT = np.isfinite(scores_IT)
    lowest = float(scores_IT[scored_IT].min()) if scored_IT.any() else 0.0
    return np.where(scored_IT, scores_IT, similarity_IT - (float(similarity_IT.max()) + 1 - lowest))


def bidirectional_recall(
    by_image_IT: npt.NDArray[Any], by_text_IT: npt.NDArray[Any], image_of_text_T: npt.ArrayLike
) -> dict[str, float]:
    """As `recall_at_k`, where the directions have scores of their own."""
    first, second = recall_at_k(by_image_IT, image_of_text_T), recall_at_k(by_text_IT, image_of_text_T)
    return {name: (first if name.startswith("i2t") else second)[name] for name in first}


def _best(similarity_IT: npt.NDArray[Any], k: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether a text is among the `k` best of an image, and an image among the `k` best of a text."""
    images, texts = similarity_IT.shape
    by_image, by_text = (np.zeros((images, texts), dtype=bool) for _ in range(2))
    best_texts = np.argpartition(-similarity_IT, min(k, texts) - 1, axis=1)[:, : min(k, texts)]
    best_images = np.argpartition(-similarity_IT, min(k, images) - 1, axis=0)[: min(k, images)]
    np.put_along_axis(by_image, best_texts, True, axis=1)
    np.put_along_axis(by_text, best_images, True, axis=0)
    return by_image, by_text


def _checked(scores_IT: npt.NDArray[Any], image_of_text_T: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The texts' image indices as an array, after checking that they fit the scores."""
    owner_T = np.asarray(image_of_text_T)
    if scores_IT.ndim != 2 or owner_T.ndim != 1 or scores_IT.shape[1] != len(owner_T) or not scores_IT.size:
        raise ValueError(f"scores of shape {scores_IT.shape} do not fit image_of_text of shape {owner_T.shape}")
    if not np.issubdtype(owner_T.dtype, np.integer) or owner_T.min() < 0 or owner_T.max() >= len(scores_IT):
        raise ValueError(f"image_of_text must hold whole numbers from 0 to {len(scores_IT) - 1}")
    texts_I = np.bincount(owner_T, minlength=len(scores_IT))
    if not texts_I.all():
        raise ValueError(f"image {int(texts_I.argmin())} has no text: leave it out of the scores")
    if np.isnan(scores_IT).any():
        raise ValueError(f"{int(np.isnan(scores_IT).sum())} of the scores are NaN")
    return owner_T.astype(np.int64)
