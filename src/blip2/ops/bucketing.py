"""Groups of rows of similar length, so that little is computed on padding; and a few padded lengths for compiled
code, which is compiled again for every new length.
"""

from __future__ import annotations

from collections.abc import Sequence

BUCKET = 8


def bucket(length: int) -> int:
    """The smallest multiple of `BUCKET` that is `length` or more."""
    return -(-length // BUCKET) * BUCKET


def length_groups(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Split rows into the groups whose padded sizes, plus `overhead` each, sum to the least.

    Rows are sorted by length and cut by dynamic programming, so the split is optimal; it takes
    time quadratic in the number of different lengths.

    Args:
        lengths: tokens of each row.
        overhead: what one more group costs, in tokens.

    Returns:
        Row numbers of each group, shortest group first; every row is in one group.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    ends = [i + 1 for i in range(len(order)) if i + 1 == len(order) or lengths[order[i]] != lengths[order[i + 1]]]
    cuts = [0, *ends]
    best = [0.0] * len(cuts)
    previous = [0] * len(cuts)
    for j in range(1, len(cuts)):
        longest = lengths[order[cuts[j] - 1]]
        best[j], previous[j] = min((best[i] + (cuts[j] - cuts[i]) * longest + overhead, i) for i in range(j))
    groups: list[list[int]] = []
    j = len(cuts) - 1
    while j > 0:
        groups.append(order[cuts[previous[j]] : cuts[j]])
        j = previous[j]
    return groups[::-1]
