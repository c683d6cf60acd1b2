"""`report.html` of a run folder: one self-contained page with curves, sample captions and cost.

Reads what a run leaves (`config.yaml`, `metrics.jsonl`, `summary.json`, `samples/`); whatever is missing or damaged,
as after a kill, is left out of the page. Curves need matplotlib (extra `train`), imported on the first drawing.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import yaml

from blip2.errors import CheckpointError
from blip2.io.html import environment, write
from blip2.metrics.table import METRICS
from blip2.training.run_log import format_seconds

Line = dict[str, float]
Points = list[tuple[float, float]]
T = TypeVar("T")

REPORT = "report.html"
LOSSES = ("loss", "itc", "itm", "itg", "lm")
RECALL = re.compile(r"(i2t|t2i)_r(\d+)")
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
SCORES = {name: metric.label for name, metric in METRICS.items()} | {"recall": "Re-ranked R@1"}
# Captions shown per image, and rows of the table of evaluations; always with first and last.
CAPTIONS, EVALUATIONS = 6, 12
# The closing loss is the mean of this many steps: a single batch says little.
LAST_STEPS = 50
# More points than this cannot be told apart at the width of a page.
POINTS = 300


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Args:
        config: the resolved config as a nested dict; empty where it cannot be read.
        config_text: `config.yaml` as it stands.
        train, dev: finite numbers of the lines of `metrics.jsonl` by kind, one per step, sorted.
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

    @property
    def step(self) -> int:
        """Steps done."""
        return int(max([self.summary.get("steps", 0)] + [line["step"] for line in self.train[-1:] + self.dev[-1:]]))

    @property
    def seconds(self) -> float:
        """Seconds of training: the summary's or all steps', whichever is more (a killed call left no summary)."""
        return max(self.summary.get("seconds", 0.0), sum(line.get("time", 0.0) for line in self.train))


@dataclass(frozen=True)
class Series:
    """One line of a figure, in matplotlib's `style`; `smooth` draws the values faintly behind their moving average."""

    label: str
    points: Points
    style: str = "C0-"
    smooth: bool = False


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path; an older one is replaced whole.

    Raises:
        CheckpointError: `folder` is not a run folder.
        RunError: the page cannot be written.
    """
    path = Path(folder) / REPORT
    write(path, render(read_run(Path(folder))))
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
    samples = {path.stem.removeprefix("step-"): _json(_text(path)) for path in folder.glob("samples/step-*.json")}
    return Run(
        folder=folder,
        config=values if isinstance(values, dict) else {},
        config_text=text,
        train=_numbers(lines, "train"),
        dev=_numbers(lines, "dev"),
        summary=_json(_text(folder / "summary.json")) or {},
        samples=sorted((int(step), entries) for step, entries in samples.items() if entries),
    )


def render(run: Run) -> str:
    """The page as HTML; every text from the run is escaped."""
    figures, missing = figures_of(run), ""
    try:
        curves = [(title, draw(lines), _alt(title, lines)) for title, lines in figures.items()]
    except ImportError:
        curves, missing = [], "Curves need matplotlib: pip install 'blip2[train]', then write the report again."
    template = environment(Path(__file__).parent).get_template("report.html.j2")
    return template.render(
        run=run,
        title=run.config.get("recipe") or run.folder.resolve().name,
        status=_status(run),
        headlines=_headlines(run),
        images=_images(run),
        curves=curves,
        curves_missing=missing,
        losses=LOSSES,
        evaluations=_spread(run.dev, EVALUATIONS),
        names=_names(run.dev),
        cost=_cost(run),
    )


def figures_of(run: Run) -> dict[str, list[Series]]:
    """Titles and lines of the figures that there are numbers for, in the order of the page."""

    def train(name: str, label: str, color: int = 0, smooth: bool = True) -> Series:
        return Series(label, points(run.train, name), f"C{color}-", smooth)

    def dev(name: str, label: str, style: str) -> Series:
        return Series(label, points(run.dev, name), style)

    parts = [name for name in LOSSES[1:] if points(run.train, name)]
    pairs = [[train(n, f"{n} train", i), dev(n, f"{n} dev", f"C{i}--")] for i, n in enumerate(parts)]
    recalls = sorted((m for m in map(RECALL.fullmatch, _names(run.dev)) if m), key=lambda m: int(m[2]))
    depths = list(dict.fromkeys(m[2] for m in recalls))
    figures = {
        "Loss": [train("loss", "train"), dev("loss", "dev", "C1-")],
        "Losses by objective": [line for pair in pairs for line in pair] if len(pairs) > 1 else [],
        "Recall on dev, %": [
            dev(m[0], f"{DIRECTIONS[m[1]]} @{m[2]}", f"C{depths.index(m[2])}{'--' if m[1] == 't2i' else '-'}")
            for m in recalls
        ],
        "Scores on dev": [dev(n, SCORES.get(n, n), f"C{i}-") for i, n in enumerate(_scores(run.dev))],
        "Learning rate": [train("lr", "learning rate", 0, smooth=False)],
        "Gradient norm": [train("grad_norm", "gradient norm", 2)],
        "Pairs per second": [train("pairs_per_s", "pairs/s", 3)],
    }
    drawn = {title: [line for line in lines if line.points] for title, lines in figures.items()}
    return {title: lines for title, lines in drawn.items() if lines}


def draw(lines: Sequence[Series]) -> str:
    """Curves over steps as the data address of an SVG: black on nothing, which a dark page inverts.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"font.size": 9, "svg.fonttype": "none", "axes.formatter.limits": (-3, 6)}
    with matplotlib.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.7, 3.1), layout="constrained")
        axes = figure.add_subplot(xlabel="step")
        for line in lines:
            steps, values = thinned(line.points).T
            if line.smooth:
                axes.plot(steps, values, line.style, alpha=0.25, linewidth=0.9)
                values = smoothed(values, len(values) // 25)
            axes.plot(steps, values, line.style, marker="." if len(steps) <= 30 else "", label=line.label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
        if len(lines) > 1:  # under the axes, where no curve can run through it
            columns = 2 if len(lines) in (2, 4) else 3
            figure.legend(frameon=False, fontsize=8, ncols=columns, loc="outside lower center")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _data_address("image/svg+xml", buffer.getvalue())


def points(lines: Iterable[Line], name: str) -> Points:
    """(step, value) of every line that has a number of this name."""
    return [(line["step"], line[name]) for line in lines if name in line]


def thinned(series: Points, limit: int = POINTS) -> npt.NDArray[np.float64]:
    """At most `limit` points [N, 2]: means over neighbours."""
    return np.array([part.mean(0) for part in np.array_split(np.array(series), min(limit, len(series)))])


def smoothed(values: npt.NDArray[np.float64], reach: int) -> npt.NDArray[np.float64]:
    """Mean of each value and its neighbours up to `reach` away on both sides, so that it does not lag behind."""
    window, inside = np.ones(2 * reach + 1), slice(reach, reach + len(values))
    return np.convolve(values, window)[inside] / np.convolve(np.ones(len(values)), window)[inside]


def _alt(title: str, lines: Sequence[Series]) -> str:
    """The words for those who do not see a figure."""
    ends = "; ".join(f"{line.label} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines)
    return f"Curve of {title[0].lower()}{title[1:]} over steps: {ends}."


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


def _numbers(lines: list[Any], kind: str) -> list[Line]:
    """Lines of a kind in the order of their steps; of a step repeated after a resumption, the later."""
    chosen = [line for line in lines if isinstance(line, dict) and line.get("kind") == kind]
    numbers = [{k: v for k, v in line.items() if type(v) in (int, float) and math.isfinite(v)} for line in chosen]
    by_step = {line["step"]: line for line in numbers if "step" in line}
    return [by_step[step] for step in sorted(by_step)]


def _names(lines: Sequence[Line]) -> list[str]:
    """Names of numbers, in the order in which they first appear."""
    return list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "time")))


def _scores(dev: Sequence[Line]) -> list[str]:
    """Names of dev numbers that are neither losses nor recall by ITC."""
    return [n for n in _names(dev) if n not in LOSSES and not RECALL.fullmatch(n) and not n.endswith("_median_rank")]


def _status(run: Run) -> str:
    planned = (run.config.get("train") or {}).get("steps")
    if planned is None:
        return f"{run.step:,} steps"
    done = run.step >= planned
    return f"all {planned:,} steps done" if done else f"stopped or running: {run.step:,} of {planned:,} steps"


def _headlines(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the numbers on top of the page."""
    depth = max((int(m[2]) for m in map(RECALL.fullmatch, _names(run.dev)) if m), default=0)
    recalls = {f"{way}_r{depth}": f"{name.capitalize()} R@{depth}" for way, name in reversed(DIRECTIONS.items())}
    losses = points(run.train, "loss")
    closing = sum(value for _, value in losses[-LAST_STEPS:]) / max(len(losses[-LAST_STEPS:]), 1)
    series = {"Training loss": [*losses[:1], (run.step, closing)] if losses else []}
    series |= {label: points(run.dev, n) for n, label in {"loss": "Dev loss", **recalls, **SCORES}.items()}
    tiles = []
    for label, values in series.items():
        form, unit = ".3f" if "loss" in label else ".1f", "%" if "R@" in label else ""
        if values:
            step, first = values[0]
            tiles.append((label, f"{values[-1][1]:{form}}{unit}", f"{first:{form}}{unit} at step {step}"))
    time = [("Time", format_seconds(run.seconds), run.summary.get("hardware", ""))] if run.seconds else []
    return tiles + time


def _cost(run: Run) -> list[tuple[str, str]]:
    speed, wait = ([value for _, value in points(run.train, name)] for name in ("pairs_per_s", "data_wait"))
    rows = [
        ("Time", format_seconds(run.seconds) if run.seconds else ""),
        ("Steps", f"{run.step:,}"),
        ("Image-text pairs", f"{run.summary['pairs']:,}" if "pairs" in run.summary else ""),
        ("Pairs per second, mean of steps", f"{sum(speed) / len(speed):.1f}" if speed else ""),
        ("Waiting for data", f"{100 * sum(wait) / len(wait):.1f}% of the time" if wait else ""),
        ("Finished", run.summary.get("finished", "")),
        ("Hardware", run.summary.get("hardware", "")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in run.summary.get("versions", {}).items())),
    ]
    return [(name, value) for name, value in rows if value]


def _images(run: Run) -> list[dict[str, Any]]:
    """Per image of the last evaluation: a thumbnail, its references, and the captions it was given, by step."""
    shown = []
    for entry in run.samples[-1][1] if run.samples else []:
        captions = [(step, e["caption"]) for step, entries in run.samples for e in entries if e["key"] == entry["key"]]
        changes = captions[:1] + [new for old, new in itertools.pairwise(captions) if old[1] != new[1]]
        earlier = _spread(changes[:-1], CAPTIONS - 1)
        thumbnail = _thumbnail(run.folder / "samples", entry["image"])
        shown.append({**entry, "image": thumbnail, "step": changes[-1][0], "earlier": earlier})
    return shown


def _thumbnail(samples: Path, name: str) -> str | None:
    """A JPEG below `samples` as a data address; None where it is missing, another kind of file or outside."""
    path = (samples / name).resolve()
    if path.suffix != ".jpg" or not path.is_relative_to(samples.resolve()) or not path.is_file():
        return None
    return _data_address("image/jpeg", path.read_bytes())


def _data_address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _spread(items: list[T], limit: int) -> list[T]:
    """At most `limit` items evenly over the list, first and last among them."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
