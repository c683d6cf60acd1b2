"""Which captions are kept, by scores made by hand."""

from __future__ import annotations

import pytest

from blip2.capfilt.choose import SYNTHETIC, WEB, Candidate, choose, filtered_entry, pool


def test_pool_is_web_first_and_without_repeats() -> None:
    pooled = pool([" IMG_01.jpg ", "A dog.", ""], ["a  dog.", "a cat", "a cat", "  "])
    assert pooled == [Candidate("IMG_01.jpg", WEB), Candidate("A dog.", WEB), Candidate("a cat", SYNTHETIC)]


CANDIDATES = [
    Candidate("web", WEB, 0.30, 0.2),
    Candidate("best", SYNTHETIC, 0.50, 0.9),
    Candidate("equal", SYNTHETIC, 0.30, 0.8),
    Candidate("worst", SYNTHETIC, -0.10, 0.6),
]


@pytest.mark.parametrize(
    ("keep", "threshold", "expected"),
    [
        (1, None, ["best"]),
        (2, None, ["best", "web"]),  # of equal scores the earlier
        (3, None, ["best", "web", "equal"]),
        (9, None, ["best", "web", "equal", "worst"]),
        (2, 0.5, ["best", "equal"]),  # the web text matches too little
        (9, 0.6, ["best", "equal", "worst"]),  # the threshold itself passes
        (2, 0.95, []),
    ],
)
def test_kept_by_hand(keep: int, threshold: float | None, expected: list[str]) -> None:
    chosen, rejected = choose(CANDIDATES, keep, threshold)
    assert [c.text for c in chosen] == expected
    assert [c.text for c in rejected] == [t for t in ("best", "web", "equal", "worst") if t not in expected]


def test_without_itm_nothing_passes_a_threshold() -> None:
    assert choose([Candidate("a", WEB, 1.0)], 2, 0.5)[0] == []


def test_entry_keeps_the_other_fields() -> None:
    entry = {"image_id": "7", "captions": ["web"], "url": "http://x", "domain": "in"}
    chosen, rejected = choose(CANDIDATES, 2, None)
    assert filtered_entry(entry, chosen, rejected) == {
        "image_id": "7",
        "captions": ["best", "web"],
        "provenance": [
            {"source": "synthetic", "score": 0.5, "itm": 0.9},
            {"source": "web", "score": 0.3, "itm": 0.2},
        ],
        "rejected": [
            {"text": "equal", "source": "synthetic", "score": 0.3, "itm": 0.8},
            {"text": "worst", "source": "synthetic", "score": -0.1, "itm": 0.6},
        ],
        "url": "http://x",
        "domain": "in",
    }
    once = filtered_entry(entry, chosen, rejected)
    assert filtered_entry(once, chosen, rejected) == once
