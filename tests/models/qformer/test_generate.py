"""Text from the Q-Former alone, against a greedy loop over one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip2.models.qformer.model import QFormer

DEC, END, V = 12, 2, 13


def make() -> tuple[QFormer, Tensor]:
    qformer = QFormer(width=8, depth=2, heads=2, inner=12, image_width=6, queries=3, vocab=V, positions=16).double()
    with torch.no_grad():
        for p in qformer.parameters():
            p.add_(0.5 * torch.randn_like(p))
        for layer in qformer.layers[::2]:  # so that texts differ from image to image
            layer.cross_attention.output.weight.mul_(4)
    return qformer.eval(), torch.randn(6, 5, 6, dtype=torch.float64)


def slow(qformer: QFormer, features: Tensor, min_tokens: int, max_tokens: int) -> list[int]:
    """Greedy for one image, everything encoded anew for every token."""
    ids = [DEC]
    while len(ids) <= max_tokens:
        _, cache = qformer.encode_queries(qformer.project_image(features[None]))
        row = torch.tensor([ids])
        logits = qformer.decode_text(row, torch.ones_like(row).bool(), cache, torch.ones_like(row).bool())[-1]
        if len(ids) <= min_tokens:
            logits[END] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == END:
            return ids[1:-1]
    return ids[1:]


@pytest.mark.parametrize(("min_tokens", "max_tokens"), [(0, 8), (3, 8), (0, 1), (12, 12)])
def test_a_batch_equals_one_image_at_a_time(min_tokens: int, max_tokens: int) -> None:
    qformer, features = make()
    got = qformer.generate(
        qformer.project_image(features), dec_id=DEC, end_id=END, min_tokens=min_tokens, max_tokens=max_tokens
    )
    assert got == [slow(qformer, image, min_tokens, max_tokens) for image in features]
    assert all(min_tokens <= len(row) <= max_tokens for row in got)
    assert all(END not in row for row in got)


def test_rows_end_at_different_lengths() -> None:
    """The check above would be weak if all rows ended together."""
    qformer, features = make()
    rows = qformer.generate(qformer.project_image(features), dec_id=DEC, end_id=END, min_tokens=0, max_tokens=8)
    assert len({len(row) for row in rows}) > 1
