"""What an evaluation came to: its outcome, the table on the terminal, and `report.html`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blip2.data.collection import BadSampleError, Collection, Sample
from blip2.data.film import read_images
from blip2.io import html
from blip2.io.figures import jpeg

SHOWN, THUMB = 8, 256


@dataclass(frozen=True)
class Outcome:
    """What a task measured.

    Args:
        metrics: by name, some of them nested; None where a metric is missing.
        entries: predictions by sample, each with its `id` and `score` (higher is better).
        missing: why, by metric.
        notes: lines for the table.
    """

    metrics: dict[str, Any]
    entries: list[dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def table(result: dict[str, Any], outcome: Outcome) -> str:
    """The table for the terminal; `result` is what `metrics.json` holds."""
    lines = [f"{result['task']}: {result['model']} on {result['data']}, {result['n']} samples", ""]
    lines += [f"  {name:<20} {value}" for name, value in result["settings"].items() if name not in ("model", "data")]
    lines += ["", f"  {'metric':<24}{'here':>10}{'paper':>10}"]
    lines += [
        f"  {name:<24}{here:>10}{paper:>10}" for name, here, paper in _rows(result["metrics"], result["published"])
    ]
    lines += [f"  {name} is missing: {reason}" for name, reason in outcome.missing.items()]
    return "\n".join([*lines, *(f"  {note}" for note in outcome.notes)])


def write_page(
    folder: Path,
    result: dict[str, Any],
    outcome: Outcome,
    data: Collection,
    example: Callable[[dict[str, Any]], dict[str, Any]],
) -> Path:
    """Write `report.html` with the numbers, the settings, and best, worst and random predictions; returns its path.

    Args:
        example: from a prediction to its `text`, `references` and, where it has them, `question` and `score`.
    """
    by_key = {sample.key: sample for sample in data.samples}

    def card(entry: dict[str, Any]) -> dict[str, Any]:
        key = entry.get("image", entry["id"])
        sample = by_key.get(key) or by_key.get(key.split("~")[0])
        return {"key": key, "image": thumbnail(sample), "question": None, "score": "", **example(entry)}

    groups = [(title, [card(outcome.entries[n]) for n in rows]) for title, rows in _selection(outcome.entries)]
    path = folder / "report.html"
    html.write_page(
        path,
        Path(__file__).with_name("page.html.j2"),
        result=result,
        rows=_rows(result["metrics"], result["published"]),
        groups=groups,
        missing=outcome.missing,
        notes=outcome.notes,
    )
    return path


def thumbnail(sample: Sample | None) -> str | None:
    """A small JPEG of a sample as a data URL; None where it cannot be read."""
    if sample is None:
        return None
    try:
        return jpeg(read_images(sample, 1)[0], THUMB)
    except BadSampleError:
        return None


def _selection(entries: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    """Positions of the best, the worst and random entries, each shown once."""
    order = sorted(range(len(entries)), key=lambda n: -entries[n]["score"])
    shown = min(SHOWN, max(1, len(order) // 3))
    best, worst = order[:shown], order[-shown:][::-1] if len(order) > shown else []
    rest = [n for n in order[shown:-shown] if n not in worst]
    random = [rest[i] for i in np.random.default_rng(0).permutation(len(rest))[:shown]]
    return [(title, rows) for title, rows in (("Best", best), ("Worst", worst), ("Random", random)) if rows]


def _rows(metrics: dict[str, Any], published: dict[str, float], prefix: str = "") -> list[tuple[str, str, str]]:
    """(metric, here, paper) as text; names of nested metrics follow those that hold them."""
    rows = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            rows += _rows(value, published, f"{prefix}{name} ")
        else:
            paper = published.get(name)
            here = "missing" if value is None else f"{value:.2f}"
            rows.append((f"{prefix}{name}", here, "" if paper is None else f"{paper:.1f}"))
    return rows
