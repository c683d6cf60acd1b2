"""`report.html` of an evaluation: the numbers, the settings, and best, worst and random examples as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from blip2.data.collection import BadSampleError, Collection, Sample
from blip2.data.images import decode_image
from blip2.evaluation.tasks import Outcome
from blip2.io.atomic import write_text
from blip2.io.figures import jpeg
from blip2.io.html import environment

SHOWN, THUMB = 8, 256


def write_page(folder: Path, result: dict[str, Any], outcome: Outcome, data: Collection) -> Path:
    """Write `report.html` into an evaluation's folder; returns its path."""
    by_key = {sample.key: sample for sample in data.samples}
    groups = [
        (title, [_example(result["task"], outcome.entries[n], by_key) for n in chosen])
        for title, chosen in _chosen(outcome.entries)
    ]
    page = (
        environment(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(result=result, rows=_rows(result), groups=groups, missing=outcome.missing, notes=outcome.notes)
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _chosen(entries: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    """Positions of the best, the worst and random entries, each shown once."""
    order = sorted(range(len(entries)), key=lambda n: -entries[n]["score"])
    shown = min(SHOWN, max(1, len(order) // 3))
    best, worst = order[:shown], order[-shown:][::-1] if len(order) > shown else []
    rest = [n for n in order[shown:-shown] if n not in worst]
    random = [rest[i] for i in np.random.default_rng(0).permutation(len(rest))[:shown]]
    return [(title, found) for title, found in (("Best", best), ("Worst", worst), ("Random", random)) if found]


def _example(task: str, entry: dict[str, Any], by_key: dict[str, Sample]) -> dict[str, Any]:
    key = entry.get("image", entry["id"])
    sample = by_key.get(key) or by_key.get(key.split("~")[0])
    out = {"key": key, "image": picture_of(sample), "question": None, "score": ""}
    if task == "vqa":
        return out | {"said": entry["answer"], "question": entry["question"], "wanted": sorted(set(entry["answers"]))}
    if task == "retrieval":
        return out | {
            "said": entry["found"],
            "wanted": entry["references"],
            "score": f"its own text at rank {entry['rank']}",
        }
    return out | {"said": entry["caption"], "wanted": entry["references"], "score": f"CIDEr {entry['score']:.0f}"}


def picture_of(sample: Sample | None) -> str | None:
    """A small JPEG of a sample as a data URL; None where it cannot be read."""
    if sample is None:
        return None
    try:
        picture = decode_image(sample.read())
    except BadSampleError:
        return None
    return jpeg(picture, THUMB)


def _rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, here, paper)."""
    rows: list[tuple[str, str, str]] = []

    def walk(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name} ")
                continue
            paper = result["published"].get(name)
            here = "missing" if value is None else f"{value:.2f}"
            rows.append((f"{prefix}{name}", here, "" if paper is None else f"{paper:.1f}"))

    walk(result["metrics"], "")
    return rows
