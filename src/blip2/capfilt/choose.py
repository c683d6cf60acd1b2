"""From texts and scores to what is kept: no models here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WEB, SYNTHETIC = "web", "synthetic"
_DIGITS = 5


@dataclass(frozen=True)
class Candidate:
    """A text for an image, and where it comes from."""

    text: str
    source: str


@dataclass(frozen=True)
class Judged:
    """A candidate with its scores: image-text similarity, and ITM probability where it was asked for."""

    text: str
    source: str
    score: float
    itm: float | None = None

    def provenance(self) -> dict[str, Any]:
        """What is written beside the caption."""
        found: dict[str, Any] = {"source": self.source, "score": round(self.score, _DIGITS)}
        return found if self.itm is None else {**found, "itm": round(self.itm, _DIGITS)}


def pool(web: Sequence[str], synthetic: Sequence[str]) -> list[Candidate]:
    """Web text and synthetic captions in one list, without empty ones and repeats (case and spaces aside)."""
    found: dict[str, Candidate] = {}
    for source, texts in ((WEB, web), (SYNTHETIC, synthetic)):
        for text in texts:
            words = text.split()
            if words:
                found.setdefault(" ".join(words).casefold(), Candidate(text.strip(), source))
    return list(found.values())


def choose(judged: Sequence[Judged], keep: int, threshold: float | None) -> tuple[list[Judged], list[Judged]]:
    """The kept and the rejected, each with the best score first; of equal scores the earlier is better.

    With a threshold, what ITM finds less likely to match is rejected whatever its rank.
    """
    ranked = sorted(judged, key=lambda one: -one.score)
    passed = [one for one in ranked if threshold is None or (one.itm is not None and one.itm >= threshold)]
    kept = passed[:keep]
    return kept, [one for one in ranked if one not in kept]


def filtered_entry(entry: dict[str, Any], kept: Sequence[Judged], rejected: Sequence[Judged]) -> dict[str, Any]:
    """The JSON object of a sample after CapFilt: all else that it told stays.

    `provenance` goes with `captions` one by one; `rejected` holds the other texts.
    """
    others = {name: value for name, value in entry.items() if name not in ("image_id", "captions", "caption")}
    return {
        "image_id": entry["image_id"],
        "captions": [one.text for one in kept],
        "provenance": [one.provenance() for one in kept],
        "rejected": [{"text": one.text, **one.provenance()} for one in rejected],
        **{name: value for name, value in others.items() if name not in ("provenance", "rejected")},
    }
