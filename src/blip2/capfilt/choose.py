"""From texts and scores to the captions that are kept: no models here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WEB, SYNTHETIC = "web", "synthetic"
_DIGITS = 5


@dataclass(frozen=True)
class Candidate:
    """A text for an image.

    Args:
        source: `web` or `synthetic`.
        score: image-text similarity.
        itm: ITM probability; None where it was not computed.
    """

    text: str
    source: str
    score: float = 0.0
    itm: float | None = None

    def provenance(self) -> dict[str, Any]:
        """What is written beside the caption."""
        entry: dict[str, Any] = {"source": self.source, "score": round(self.score, _DIGITS)}
        return entry if self.itm is None else {**entry, "itm": round(self.itm, _DIGITS)}


def pool(web: Sequence[str], synthetic: Sequence[str]) -> list[Candidate]:
    """Web text and synthetic captions in one list, without empty ones and repeats (case and spaces aside)."""
    candidates: dict[str, Candidate] = {}
    for source, texts in ((WEB, web), (SYNTHETIC, synthetic)):
        for text in texts:
            if words := text.split():
                candidates.setdefault(" ".join(words).casefold(), Candidate(text.strip(), source))
    return list(candidates.values())


def choose(
    candidates: Sequence[Candidate], keep: int, threshold: float | None
) -> tuple[list[Candidate], list[Candidate]]:
    """The chosen and the rejected, each with the best score first; of equal scores the earlier is better.

    With a threshold, what ITM finds less likely to match is rejected whatever its rank.
    """
    ranked = sorted(candidates, key=lambda candidate: -candidate.score)
    chosen = [c for c in ranked if threshold is None or (c.itm is not None and c.itm >= threshold)][:keep]
    return chosen, [candidate for candidate in ranked if candidate not in chosen]


def filtered_entry(entry: dict[str, Any], chosen: Sequence[Candidate], rejected: Sequence[Candidate]) -> dict[str, Any]:
    """The JSON object of a sample after CapFilt: all its other fields stay.

    `provenance` goes with `captions` one by one; `rejected` holds the other texts.
    """
    replaced = ("image_id", "captions", "caption", "provenance", "rejected")
    return {
        "image_id": entry["image_id"],
        "captions": [candidate.text for candidate in chosen],
        "provenance": [candidate.provenance() for candidate in chosen],
        "rejected": [{"text": candidate.text, **candidate.provenance()} for candidate in rejected],
        **{name: value for name, value in entry.items() if name not in replaced},
    }
