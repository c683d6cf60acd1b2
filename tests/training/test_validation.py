"""Dev recall over what has captions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip2.training.validation import _Ranking


class Embeddings:
    """A model whose images and texts are the unit vectors that their first number names."""

    def embed_features(self, features_BPC: Tensor) -> Tensor:
        return torch.eye(8)[features_BPC[:, 0, 0].long()][:, None]

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.eye(8)[[int(text) for text in texts]]


def features(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, 2, 3)


def test_images_without_a_caption_are_not_ranked() -> None:
    model: Any = Embeddings()
    ranking = _Ranking(model, rerank=False)
    ranking.add(features(1, 2, 3), [("1",), (), ("3",)])
    ranking.add(features(4), [()])
    ranking.add(features(5), [("5",)])
    recall = ranking.recall()
    assert (recall["i2t_r1"], recall["t2i_r1"]) == (100.0, 100.0)
    assert (ranking.count, ranking.image_of_text) == (3, [0, 1, 2])
    alone = _Ranking(model, rerank=False)
    alone.add(features(1, 2), [("1",), ()])
    assert alone.recall() == {}
