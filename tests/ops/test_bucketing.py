"""Groups of similar length: the best split there is, and nothing lost."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from blip2.ops.bucketing import bucket, length_groups


def cost(groups: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + overhead for group in groups)


def best(lengths: list[int], overhead: int) -> int:
    """The least cost over every way to cut the sorted rows."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    costs = []
    for cuts in range(len(order)):
        for places in combinations(range(1, len(order)), cuts):
            ends = [0, *places, len(order)]
            costs.append(cost([order[a:b] for a, b in pairwise(ends)], lengths, overhead))
    return min(costs)


def test_buckets_are_the_next_multiples_of_eight() -> None:
    assert [bucket(length) for length in (1, 7, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 24]


@pytest.mark.parametrize("overhead", [0, 3, 20, 1000])
@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_no_split_is_cheaper(rows: int, overhead: int) -> None:
    for seed in range(5):
        lengths = [random.Random(seed).randint(1, 30) for _ in range(rows)]
        groups = length_groups(lengths, overhead)
        assert sorted(row for group in groups for row in group) == list(range(rows))
        assert cost(groups, lengths, overhead) == best(lengths, overhead)


def test_ends() -> None:
    assert length_groups([], 3) == []
    assert length_groups([4, 4, 4], 0) == [[0, 1, 2]]
    assert length_groups([9, 1, 9, 1], 0) == [[1, 3], [0, 2]]
    assert len(length_groups([1, 50, 99], 10_000)) == 1
