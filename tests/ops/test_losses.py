"""The losses against loops over rows, forward and backward, and tables worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blip2.ops.losses import head_loss, itc_loss, itm_loss, next_token_positions


def slow_cross_entropy(logits: Tensor, targets: list[list[float]], smoothing: float) -> Tensor:
    """Mean over rows of -sum of target x log probability, written out."""
    total, columns = logits.new_zeros(()), logits.shape[1]
    for row, target in zip(logits.unbind(), targets, strict=True):
        log_sum = torch.log(sum((x.exp() for x in row.unbind()), row.new_zeros(())))
        for x, mass in zip(row.unbind(), target, strict=True):
            total = total - ((1 - smoothing) * mass + smoothing / columns) * (x - log_sum)
    return total / len(logits)


def one_hot(index: list[int], columns: int) -> list[list[float]]:
    return [[float(i == j) for j in range(columns)] for i in index]


def assert_same(fast: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    """Losses are computed in float32 whatever comes in: 1e-6 is its rounding over a few sums."""
    torch.testing.assert_close(fast.double(), slow, rtol=2e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_itc(smoothing: float) -> None:
    i2t = (5 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    t2i = (5 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    targets = [[0.5, 0, 0.5, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    fast = itc_loss(i2t, t2i, torch.tensor(targets), label_smoothing=smoothing)
    slow = (slow_cross_entropy(i2t, targets, smoothing) + slow_cross_entropy(t2i, targets, smoothing)) / 2
    assert_same(fast, slow, [i2t, t2i])


def test_itc_by_hand() -> None:
    """Equal similarities: ln 4 in both directions, smoothed or not."""
    for smoothing in (0.0, 0.1):
        loss = itc_loss(torch.zeros(4, 4), torch.ones(4, 4), torch.eye(4), label_smoothing=smoothing)
        assert loss.item() == pytest.approx(math.log(4))


def test_itc_of_one_pair_is_zero() -> None:
    assert itc_loss(torch.tensor([[3.0]]), torch.tensor([[3.0]]), torch.ones(1, 1)).item() == 0


def test_itm() -> None:
    logits = (3 * torch.randn(6, 2, dtype=torch.float64)).requires_grad_()
    match = [1, 1, 0, 0, 0, 0]
    slow = slow_cross_entropy(logits, one_hot(match, 2), 0.0)
    assert_same(itm_loss(logits, torch.tensor(match)), slow, [logits])
    assert itm_loss(logits, torch.tensor(match).bool()) == itm_loss(logits, torch.tensor(match))


def test_itm_by_hand() -> None:
    """Always answering "one in three" costs the entropy of that, 0.6365: where ITM starts."""
    logits = torch.tensor([[2 / 3, 1 / 3]]).log().expand(3, -1)
    assert itm_loss(logits, torch.tensor([1, 0, 0])).item() == pytest.approx(0.6365, abs=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_a_head(smoothing: float) -> None:
    """ITG is smoothed, the language model's loss is not."""
    logits = (3 * torch.randn(7, 11, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(11, (7,))
    slow = slow_cross_entropy(logits, one_hot(targets.tolist(), 11), smoothing)
    assert_same(head_loss(logits, torch.nn.Identity(), targets, label_smoothing=smoothing).mean(), slow, [logits])


def test_losses_leave_bf16() -> None:
    """Under bf16 autocast logits come in bf16: the loss itself is in float32."""
    logits, targets = torch.randn(4, 9).bfloat16(), torch.randint(9, (4,))
    losses = head_loss(logits, torch.nn.Identity(), targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, head_loss(logits.float(), torch.nn.Identity(), targets))
    assert itm_loss(logits[:, :2], targets % 2).dtype == torch.float32
    assert itc_loss(logits[:, :4], logits[:, :4], torch.eye(4)).dtype == torch.float32


def test_next_token_positions() -> None:
    """Rows of 4, 2 and 1 real tokens: position i predicts i + 1, nothing predicts padding."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    predicting, predicted = next_token_positions(mask)
    assert predicting.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert predicted.int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
