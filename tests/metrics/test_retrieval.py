"""Recall and median rank against tables worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from blip2.metrics.retrieval import recall_at_k, retrieval_ranks

# Three images; texts 0, 1 describe image 0, text 2 image 1, texts 3, 4 image 2.
OWNERS = [0, 0, 1, 2, 2]
SCORES = np.array(
    [
        # own  own
        [0.90, 0.10, 0.80, 0.30, 0.20],  # best own 0.90: nothing ahead, rank 1
        [0.95, 0.40, 0.50, 0.60, 0.10],  # own 0.50: 0.95 and 0.60 ahead, rank 3
        [0.20, 0.70, 0.60, 0.65, 0.05],  # best own 0.65: 0.70 ahead, rank 2
    ]
)
# Text columns: t0 0.90 behind 0.95: 2; t1 0.10 is last: 3; t2 0.50 is last: 3; t3 0.65 first: 1; t4 0.05 last: 3.


def test_table_by_hand() -> None:
    image_ranks, text_ranks = retrieval_ranks(SCORES, OWNERS)
    assert image_ranks.tolist() == [1, 3, 2]
    assert text_ranks.tolist() == [2, 3, 3, 1, 3]
    assert recall_at_k(SCORES, OWNERS, ks=(1, 2, 3)) == {
        "i2t_r1": pytest.approx(100 / 3),
        "i2t_r2": pytest.approx(200 / 3),
        "i2t_r3": 100.0,
        "t2i_r1": 20.0,
        "t2i_r2": 40.0,
        "t2i_r3": 100.0,
        "i2t_median_rank": 2.0,
        "t2i_median_rank": 3.0,
    }


def test_own_texts_never_stand_ahead_of_each_other() -> None:
    image_ranks, _ = retrieval_ranks(np.array([[0.9, 0.8, 0.7], [0.1, 0.1, 0.2]]), [0, 0, 1])
    assert image_ranks.tolist() == [1, 1]


def test_ties_rank_last() -> None:
    image_ranks, text_ranks = retrieval_ranks(np.zeros((4, 4)), np.arange(4))
    assert image_ranks.tolist() == [4, 4, 4, 4]
    assert text_ranks.tolist() == [4, 4, 4, 4]
    assert recall_at_k(np.zeros((4, 4)), np.arange(4), ks=(1, 3))["i2t_r3"] == 0.0


def test_pairs_never_considered_rank_last() -> None:
    scores = np.full((3, 3), -np.inf)
    scores[0, 0] = 1.0
    image_ranks, text_ranks = retrieval_ranks(scores, np.arange(3))
    assert image_ranks.tolist() == [1, 3, 3]
    assert text_ranks.tolist() == [1, 3, 3]


def test_agrees_with_sorting_where_nothing_ties() -> None:
    rng = np.random.default_rng(0)
    owners = np.concatenate([np.arange(7), rng.integers(0, 7, 13)])
    scores = rng.normal(size=(7, 20))
    image_ranks, text_ranks = retrieval_ranks(scores, owners)
    for image in range(7):
        order = owners[np.argsort(-scores[image])].tolist()
        assert image_ranks[image] == 1 + order.index(image)
    for text in range(20):
        assert text_ranks[text] == 1 + np.argsort(-scores[:, text]).tolist().index(owners[text])


def test_default_depths() -> None:
    result = recall_at_k(np.eye(12, dtype=np.float32), np.arange(12))
    assert [k for k in result if k.startswith("i2t")] == ["i2t_r1", "i2t_r5", "i2t_r10", "i2t_median_rank"]
    assert all(v == (1.0 if k.endswith("rank") else 100.0) for k, v in result.items())


@pytest.mark.parametrize(
    ("scores", "owners", "message"),
    [
        (np.zeros((2, 3)), [0, 1], "do not fit"),
        (np.zeros((0, 0)), [], "do not fit"),
        (np.zeros((2, 2)), [0, 2], "whole numbers from 0 to 1"),
        (np.zeros((2, 2)), [-1, 1], "whole numbers from 0 to 1"),
        (np.zeros((2, 2)), [0.0, 1.0], "whole numbers"),
        (np.zeros((2, 2)), [0, 0], "image 1 has no text"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), [0, 1], "1 of the scores are NaN"),
    ],
)
def test_refuses(scores: np.ndarray, owners: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall_at_k(scores, owners)


def test_refuses_a_depth_of_zero() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        recall_at_k(np.eye(2), [0, 1], ks=(0,))
