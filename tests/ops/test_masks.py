"""The self-attention masks as tables: 2 queries, 3 text tokens, the second row one token short."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blip2.ops.masks import bidirectional_mask, multimodal_causal_mask

QUERIES = 2
TEXT = torch.tensor([[1, 1, 1], [1, 1, 0]])

BIDIRECTIONAL = (
    """
    x x x x x
    x x x x x
    x x x x x
    x x x x x
    x x x x x
    """,
    """
    x x x x .
    x x x x .
    x x x x .
    x x x x .
    x x x x .
    """,
)
MULTIMODAL_CAUSAL = (
    """
    x x . . .
    x x . . .
    x x x . .
    x x x x .
    x x x x x
    """,
    """
    x x . . .
    x x . . .
    x x x . .
    x x x x .
    x x x x .
    """,
)
MASKS = [(bidirectional_mask, BIDIRECTIONAL), (multimodal_causal_mask, MULTIMODAL_CAUSAL)]


def drawn(table: str) -> list[list[bool]]:
    return [[cell == "x" for cell in line.split()] for line in table.split("\n") if line.strip()]


@pytest.mark.parametrize(("build", "tables"), MASKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_table(build: Callable[[int, Tensor], Tensor], tables: tuple[str, str], dtype: torch.dtype) -> None:
    mask = build(QUERIES, TEXT.to(dtype))
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 5, 5)
    assert mask[:, 0].tolist() == [drawn(table) for table in tables]


@pytest.mark.parametrize(("build", "tables"), MASKS)
def test_no_row_is_empty(build: Callable[[int, Tensor], Tensor], tables: tuple[str, str]) -> None:
    """An empty row would be NaN after softmax, in a padded place of a batch too."""
    text = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    assert build(3, text).any(dim=-1).all()
