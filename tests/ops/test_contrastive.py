"""Similarities, ITC targets and hard negatives against loops and tables worked by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.ops.contrastive import itc_targets, query_text_similarity, sample_hard_negatives, text_query_similarity


def slow_similarity(queries_BQE: Tensor, texts_GE: Tensor) -> Tensor:
    rows = [
        [torch.stack([query @ text for query in queries]).max() for text in texts_GE.unbind()]
        for queries in queries_BQE.unbind()
    ]
    return torch.stack([torch.stack(row) for row in rows])


def test_similarity_is_the_best_query_forward_and_backward() -> None:
    queries = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 7, dtype=torch.float64)
    fast, slow = query_text_similarity(queries, texts), slow_similarity(queries, texts)
    assert fast.shape == (3, 7)
    torch.testing.assert_close(fast, slow)
    for got, want in zip(
        torch.autograd.grad((fast * weights).sum(), [queries, texts]),
        torch.autograd.grad((slow * weights).sum(), [queries, texts]),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_similarity_gradcheck() -> None:
    queries = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(query_text_similarity, (queries, texts))
    assert torch.autograd.gradcheck(text_query_similarity, (texts, queries))


def test_both_directions_agree() -> None:
    queries, texts = torch.randn(4, 3, 5), torch.randn(2, 5)
    torch.testing.assert_close(text_query_similarity(texts, queries), query_text_similarity(queries, texts).t())


def test_one_pair() -> None:
    queries = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    text = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(query_text_similarity(queries, text), torch.tensor([[0.8]]))


def test_targets_share_the_mass_of_one_image() -> None:
    all_ids = torch.tensor([7, 3, 7, 5, 7, 3])
    targets = itc_targets(torch.tensor([7, 3, 5]), all_ids)
    third = 1 / 3
    torch.testing.assert_close(
        targets,
        torch.tensor([[third, 0, third, 0, third, 0], [0, 0.5, 0, 0, 0, 0.5], [0, 0, 0, 1, 0, 0]]),
    )


def test_targets_without_repeats_are_the_identity() -> None:
    ids = torch.tensor([11, 2, 9])
    assert torch.equal(itc_targets(ids, ids), torch.eye(3))


def slow_draw(logits: list[float], positive: list[bool], uniform: float) -> int:
    """Walk along the cumulative probabilities of the negatives until `uniform` is passed."""
    weights = [0.0 if p else float(torch.tensor(x).double().exp()) for x, p in zip(logits, positive, strict=True)]
    left = uniform * sum(weights)
    for column, weight in enumerate(weights):
        left -= weight
        if weight and left < 0:
            return column
    return -1


def test_draw_follows_the_cumulative_softmax() -> None:
    logits, uniform = 2 * torch.randn(50, 9), torch.rand(50)
    ids, all_ids = torch.randint(4, (50,)), torch.arange(9) % 4
    drawn = sample_hard_negatives(logits, ids, all_ids, uniform)
    for row in range(50):
        positive = (all_ids == ids[row]).tolist()
        assert drawn[row] == slow_draw(logits[row].tolist(), positive, float(uniform[row]))


def test_never_a_positive() -> None:
    """Even where the positive is by far the most similar, and at both ends of the uniforms."""
    ids = torch.tensor([0, 1, 2, 3]).repeat_interleave(100)
    all_ids = torch.tensor([0, 1, 2, 3, 0, 3])
    logits = torch.randn(400, 6) + 50 * (ids[:, None] == all_ids)
    for uniform in (torch.rand(400), torch.zeros(400), torch.full((400,), 1 - 2**-24)):
        drawn = sample_hard_negatives(logits, ids, all_ids, uniform)
        assert drawn.dtype == torch.int64
        assert ((drawn >= 0) & (drawn < 6)).all()
        assert (all_ids[drawn] != ids).all()


def test_frequency_is_the_softmax_over_negatives() -> None:
    """Evenly spaced uniforms: an inverse-CDF draw hits column j n x p_j times, give or take one."""
    n, logits = 10_000, torch.tensor([3.0, 1.0, -1.0, 2.0, 9.0, 0.0])
    ids, all_ids = torch.zeros(n, dtype=torch.int64), torch.tensor([5, 0, 6, 7, 0, 8])
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = sample_hard_negatives(logits.expand(n, -1), ids, all_ids, uniform)
    counts = torch.bincount(drawn, minlength=6).double()
    expected = n * torch.softmax(logits.double().masked_fill(all_ids == 0, -torch.inf), dim=0)
    assert (counts - expected).abs().max() <= 1


def test_frequency_with_random_uniforms() -> None:
    """Pearson's statistic of 5 negatives (4 degrees of freedom) stays under its 99.99% quantile, 23.5."""
    n, logits = 20_000, torch.randn(6)
    drawn = sample_hard_negatives(logits.expand(n, -1), torch.zeros(n), torch.arange(6), torch.rand(n))
    expected = n * torch.softmax(logits[1:].double(), dim=0)
    counts = torch.bincount(drawn, minlength=6).double()
    assert counts[0] == 0
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 23.5


def test_a_batch_of_one_image_has_no_negative() -> None:
    ids = torch.tensor([4, 4, 4])
    assert sample_hard_negatives(torch.randn(3, 3), ids, ids, torch.rand(3)).tolist() == [-1, -1, -1]
    assert sample_hard_negatives(torch.randn(1, 1), ids[:1], ids[:1], torch.rand(1)).tolist() == [-1]


def test_only_the_row_without_negative_gets_minus_one() -> None:
    all_ids = torch.tensor([4, 4])
    assert sample_hard_negatives(torch.zeros(2, 2), torch.tensor([4, 1]), all_ids, torch.zeros(2)).tolist() == [-1, 0]


def test_one_row_of_many_columns() -> None:
    drawn = sample_hard_negatives(torch.zeros(1, 4), torch.tensor([0]), torch.arange(4), torch.tensor([0.5]))
    assert drawn.tolist() == [2]


def test_a_pure_function_of_the_uniforms() -> None:
    logits, ids, uniform = torch.randn(8, 8), torch.arange(8), torch.rand(8)
    first = sample_hard_negatives(logits, ids, ids, uniform)
    torch.manual_seed(99)
    assert torch.equal(sample_hard_negatives(logits, ids, ids, uniform), first)
    # rows are drawn one by one: a process that holds some of them draws the same for those
    part = sample_hard_negatives(logits[2:5], ids[2:5], ids, uniform[2:5])
    assert torch.equal(part, first[2:5])
    assert not torch.equal(sample_hard_negatives(logits, ids, ids, (uniform + 0.5) % 1), first)


def test_extreme_logits_and_transposed_ones() -> None:
    """Far-away columns underflow in the softmax but stay reachable; a transposed view is read right."""
    logits = torch.tensor([[0.0, -2000.0, -2000.0]])
    assert sample_hard_negatives(logits, torch.tensor([0]), torch.arange(3), torch.tensor([0.9])).tolist() == [2]
    square, ids, uniform = 3 * torch.randn(6, 6), torch.arange(6), torch.rand(6)
    assert torch.equal(
        sample_hard_negatives(square.t(), ids, ids, uniform),
        sample_hard_negatives(square.t().contiguous(), ids, ids, uniform),
    )


def test_no_gradient_passes() -> None:
    logits = torch.randn(3, 3, requires_grad=True)
    assert not sample_hard_negatives(logits, torch.arange(3), torch.arange(3), torch.rand(3)).requires_grad
