"""`report.html` of a run folder: one self-contained page with curves, sample captions and cost.

Reads what a run leaves (`config.yaml`, `metrics.jsonl`, `summary.json`, `samples/`); whatever is
missing, as in a run that was stopped, is left out of the page.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from blip2.errors import CheckpointError, RunError
from blip2.io.html import environment
from blip2.training.plots import LOSSES, RECALL, Curve, Line, draw_curves, is_number, points

REPORT = "report.html"
_TEMPLATE = "report.html.j2"
_MIME = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
# Captions shown open per photograph, and rows of the table of evaluations; always with first and last.
_CAPTIONS, _EVALUATIONS = 6, 12
# The closing loss is the mean of this many steps: a single batch says little.
_LAST_STEPS = 50


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Args:
        config: the resolved config as a nested dict; empty where it cannot be read.
        config_text: `config.yaml` as it stands.
        train, dev: lines of `metrics.jsonl` by kind, one per step, sorted.
        summary: `summary.json`; empty until a run ends.
        samples: (step, captioned images) of every evaluation, sorted.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    train: list[Line]
    dev: list[Line]
    summary: dict[str, Any]
    samples: list[tuple[int, list[dict[str, Any]]]]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path; an older one is replaced whole.

    Raises:
        CheckpointError: `folder` is not a run folder.
        RunError: the page cannot be written.
    """
    page = render(read_run(Path(folder)))
    path = Path(folder) / REPORT
    beside = path.with_suffix(".html.tmp")
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror}); make room or give a writable folder") from None
    return path


def read_run(folder: Path) -> Run:
    """Read a run folder; missing or damaged pieces come out empty.

    Raises:
        CheckpointError: neither a config nor metrics are there.
    """
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not config.is_file() and not metrics.is_file():
        raise CheckpointError(f"{folder}: no config.yaml or metrics.jsonl; give the folder that `blip2 train` wrote")
    text = _text(config)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    lines = [_json(line) for line in _text(metrics).splitlines()]
    summary = _json(_text(folder / "summary.json"))
    return Run(
        folder=folder,
        config=values if isinstance(values, dict) else {},
        config_text=text,
        train=_by_step(lines, "train"),
        dev=_by_step(lines, "dev"),
        summary=summary if isinstance(summary, dict) else {},
        samples=_samples(folder / "samples"),
    )


def render(run: Run) -> str:
    """The page as HTML; every text from the run is escaped."""
    templates = environment(Path(__file__).parent)
    templates.filters |= {"count": _count, "duration": _duration}
    curves, note = _curves(run)
    return templates.get_template(_TEMPLATE).render(
        title=str(run.config.get("recipe") or run.folder.resolve().name),
        stage={"stage1": "representation learning", "stage2": "generative learning"}.get(
            str(run.config.get("stage")), ""
        ),
        status=_status(run),
        headlines=_headlines(run),
        curves=curves,
        curves_note=note,
        photographs=_photographs(run),
        evaluations=_evaluations(run.dev),
        parameters=_parameters(run.summary),
        loaded=_loaded(run.summary),
        cost=_cost(run),
        skipped=_mapping(run.summary, "skipped"),
        lost_shards=_mapping(run.summary, "lost_shards"),
        finished="skipped" in run.summary,
        config=run.config_text,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(text: str) -> Any:
    """The value, or None: the last line of a killed run is often half a line."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _by_step(lines: list[Any], kind: str) -> list[Line]:
    """Lines of a kind in the order of their steps; a step repeated after a resumption counts once, the later."""
    found = {
        line["step"]: line
        for line in lines
        if isinstance(line, dict) and line.get("kind") == kind and is_number(line.get("step"))
    }
    return [found[step] for step in sorted(found)]


def _samples(folder: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    found = []
    for path in folder.glob("step-*.json"):
        number, entries = path.stem.removeprefix("step-"), _json(_text(path))
        if number.isdigit() and isinstance(entries, list):
            kept = [e for e in entries if isinstance(e, dict) and "key" in e]
            found.append((int(number), kept))
    return sorted(found, key=lambda pair: pair[0])


def _mapping(summary: dict[str, Any], name: str) -> dict[str, Any]:
    value = summary.get(name)
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}


def _number(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name)
    return float(value) if is_number(value) else None


def _last_step(run: Run) -> int:
    return int(max([_number(run.summary, "steps") or 0] + [line["step"] for line in run.train[-1:] + run.dev[-1:]]))


def _planned_steps(run: Run) -> int | None:
    train = run.config.get("train")
    steps = _number(train, "steps") if isinstance(train, dict) else None
    return None if steps is None else int(steps)


def _status(run: Run) -> str:
    step, planned = _last_step(run), _planned_steps(run)
    if planned is None:
        return f"{step:,} steps"
    return f"all {planned:,} steps done" if step >= planned else f"stopped or running: {step:,} of {planned:,} steps"


def _headlines(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the numbers on top of the page."""
    found = []
    losses = points(run.train, "loss")
    if losses:
        last = [value for _, value in losses[-_LAST_STEPS:]]
        found.append(
            ("Training loss", f"{sum(last) / len(last):.3f}", f"{losses[0][1]:.3f} at step {losses[0][0]:.0f}")
        )
    dev = points(run.dev, "loss")
    if dev:
        found.append(("Dev loss", f"{dev[-1][1]:.3f}", f"{dev[0][1]:.3f} at step {dev[0][0]:.0f}"))
    for key, label in (("t2i_r", "Text to image"), ("i2t_r", "Image to text")):
        depths = sorted({int(m[2]) for line in run.dev for m in map(RECALL.match, line) if m and m[1] == key[:3]})
        series = points(run.dev, f"{key}{depths[-1]}") if depths else []
        if series:
            remark = f"{series[0][1]:.1f}% at step {series[0][0]:.0f}"
            found.append((f"{label} R@{depths[-1]}", f"{series[-1][1]:.1f}%", remark))
    for key, label in (("cider", "CIDEr"), ("bleu4", "BLEU-4"), ("accuracy", "Accuracy")):
        series = points(run.dev, key)
        if series:
            found.append((label, f"{series[-1][1]:.1f}", f"{series[0][1]:.1f} at step {series[0][0]:.0f}"))
    seconds = _seconds(run)
    if seconds:
        found.append(("Time", _duration(seconds), _text_of(run.summary.get("hardware"))))
    return found


def _seconds(run: Run) -> float | None:
    """Seconds of training: the summary's or all steps', whichever is more (a killed call left no summary)."""
    steps = sum(value for _, value in points(run.train, "time"))
    return max(_number(run.summary, "seconds") or 0.0, steps) or None


def _cost(run: Run) -> list[tuple[str, str]]:
    speed = [value for _, value in points(run.train, "pairs_per_s")]
    wait = [value for _, value in points(run.train, "data_wait")]
    seconds, pairs = _seconds(run), _number(run.summary, "pairs")
    rows = [
        ("Time", _duration(seconds) if seconds else ""),
        ("Steps", f"{_last_step(run):,}"),
        ("Image-text pairs", f"{int(pairs):,}" if pairs is not None else ""),
        ("Pairs per second, mean of steps", f"{sum(speed) / len(speed):.1f}" if speed else ""),
        ("Waiting for data", f"{100 * sum(wait) / len(wait):.1f}% of the time" if wait else ""),
        ("Finished", _text_of(run.summary.get("finished"))),
        ("Hardware", _text_of(run.summary.get("hardware"))),
        ("Versions", ", ".join(f"{k} {v}" for k, v in _mapping(run.summary, "versions").items())),
    ]
    return [(name, value) for name, value in rows if value]


def _parameters(summary: dict[str, Any]) -> dict[str, Any] | None:
    rows = [r for r in summary.get("parameters") or [] if isinstance(r, dict) and "name" in r]
    parts = [
        {"name": str(r["name"]), "trainable": int(r.get("trainable") or 0), "frozen": int(r.get("frozen") or 0)}
        for r in rows
    ]
    if not parts:
        return None
    return {
        "parts": parts,
        "trainable": sum(p["trainable"] for p in parts),
        "frozen": sum(p["frozen"] for p in parts),
    }


def _loaded(summary: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(part, lines) on where weights came from; plain lines stand under no part."""
    loaded = summary.get("loaded")
    if isinstance(loaded, list):
        return [("", [str(line)]) for line in loaded]
    return [
        (name, [str(line) for line in lines] if isinstance(lines, list) else [_text_of(lines)])
        for name, lines in _mapping(summary, "loaded").items()
    ]


def _evaluations(dev: list[Line]) -> dict[str, Any] | None:
    """Table of dev numbers: a row per evaluation, evenly thinned where there are many."""
    names = list(
        dict.fromkeys(k for line in dev for k, v in line.items() if is_number(v) and k not in ("step", "time"))
    )
    if not names:
        return None
    formats = {k: _format(k, [line[k] for line in dev if is_number(line.get(k))]) for k in names}
    rows = [
        (int(line["step"]), [format(line[k], formats[k]) if is_number(line.get(k)) else "" for k in names])
        for line in dev
    ]
    return {"names": names, "rows": _spread(rows, _EVALUATIONS), "all": len(rows)}


def _format(name: str, values: list[float]) -> str:
    """One format for a column: losses to three decimals, percentages and ranks to one, whole numbers as they are."""
    if name in LOSSES:
        return ".3f"
    if all(value == int(value) for value in values):
        return ".0f"
    return ".1f" if max(map(abs, values)) >= 1 else ".3g"


def _photographs(run: Run) -> list[dict[str, Any]]:
    """Per image of the last evaluation: its picture, references, and what was said of it at which step."""
    if not run.samples:
        return []
    said: dict[str, list[tuple[int, str]]] = {}
    for step, entries in run.samples:
        for entry in entries:
            said.setdefault(str(entry["key"]), []).append((step, _text_of(entry.get("caption"))))
    found = []
    for entry in run.samples[-1][1]:
        captions = said[str(entry["key"])]
        references = entry.get("references")
        found.append(
            {
                "key": str(entry["key"]),
                "image": _data_uri(run.folder / "samples", _text_of(entry.get("image"))),
                "caption": captions[-1][1],
                "step": _changes(captions)[-1][0],
                "earlier": _spread(_changes(captions)[:-1], _CAPTIONS - 1),
                "references": [str(r) for r in references] if isinstance(references, list) else [],
            }
        )
    return found


def _changes(captions: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Captions that differ from the one before, with the step at which each first appeared."""
    return [new for old, new in zip([None, *captions], captions, strict=False) if old is None or old[1] != new[1]]


def _data_uri(samples: Path, name: str) -> str | None:
    """A picture below `samples` as a data address; None where it is missing, foreign or outside."""
    path = (samples / name).resolve()
    mime = _MIME.get(path.suffix.lower())
    if not name or mime is None or not path.is_relative_to(samples.resolve()) or not path.is_file():
        return None
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _curves(run: Run) -> tuple[list[Curve], str]:
    try:
        return draw_curves(run.train, run.dev), ""
    except ImportError:
        return [], "Curves need matplotlib: pip install 'blip2[train]', then write the report again."


def _spread(items: list[Any], limit: int) -> list[Any]:
    """At most `limit` items evenly over the list, first and last among them."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _text_of(value: Any) -> str:
    return "" if value is None else str(value)


def _count(value: int) -> str:
    """A parameter count as people say it: 30.3M, 512."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
