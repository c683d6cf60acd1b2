"""Curves of a run as inline SVG: losses, recall, learning rate, gradient norm, speed.

Needs matplotlib (extra `train`), imported on the first drawing. Text and axes take the page's own
text colour, so that the pictures fit a light and a dark page.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Line = dict[str, Any]
Point = tuple[float, float]

LOSSES = ("loss", "itc", "itm", "itg", "lm")
RECALL = re.compile(r"^(i2t|t2i)_r(\d+)$")
SCORES = ("cider", "bleu4", "rouge_l", "accuracy")

# Readable on white and on near-black alike.
COLORS = ("#3b82d6", "#e0703a", "#2f9e6e", "#a35fc9", "#c79a1b", "#d14d72")
# Drawn in colours that occur nowhere else, then replaced by CSS.
_TEXT, _GRID = "#010203", "#040506"
# More points than this cannot be told apart at the width of a page.
_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """One picture: an inline SVG, its title, and the words for those who do not see it."""

    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Series:
    """One line of a picture; `smooth` draws the values faintly behind their moving average."""

    label: str
    points: list[Point]
    smooth: bool = False
    color: int = 0
    dashed: bool = False


def draw_curves(train: Sequence[Line], dev: Sequence[Line]) -> list[Curve]:
    """The pictures that the lines of `metrics.jsonl` have numbers for, in the order of the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    curves = [
        _curve("Loss", [*_losses(train, dev, ("loss",))], "training loss and dev loss"),
        _parts(train, dev),
        _curve("Recall on dev, %", _recalls(dev), "retrieval recall on dev images"),
        _curve("Caption scores on dev", [_series(dev, k, k, i) for i, k in enumerate(SCORES)], "scores on dev"),
        _curve("Learning rate", [_series(train, "lr", "learning rate", 0)], "learning rate"),
        _curve("Gradient norm", [_series(train, "grad_norm", "gradient norm", 2, smooth=True)], "gradient norm"),
        _curve("Pairs per second", [_series(train, "pairs_per_s", "pairs/s", 3, smooth=True)], "training speed"),
    ]
    return [curve for curve in curves if curve is not None]


def points(lines: Iterable[Line], key: str) -> list[Point]:
    """(step, value) of every line where `key` is a finite number."""
    found = []
    for line in lines:
        value, step = line.get(key), line.get("step")
        if is_number(value) and is_number(step):
            found.append((float(step), float(value)))
    return found


def is_number(value: Any) -> TypeGuard[int | float]:
    """A finite number, which NaN, None and a boolean are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and its neighbours up to `reach` away on both sides, so that it does not lag behind."""
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def thinned(series: Sequence[Point], limit: int = _POINTS) -> list[Point]:
    """At most `limit` points: means over neighbours of equal count."""
    size = math.ceil(len(series) / limit) if series else 1
    groups = [series[i : i + size] for i in range(0, len(series), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _series(lines: Sequence[Line], key: str, label: str, color: int, *, smooth: bool = False) -> Series:
    return Series(label, points(lines, key), smooth, color)


def _losses(train: Sequence[Line], dev: Sequence[Line], names: Sequence[str]) -> list[Series]:
    found = []
    for i, name in enumerate(names):
        prefix = f"{name} " if len(names) > 1 else ""
        color = i if len(names) > 1 else 0
        found.append(Series(f"{prefix}train", points(train, name), True, color))
        found.append(Series(f"{prefix}dev", points(dev, name), False, color if prefix else 1, bool(prefix)))
    return found


def _parts(train: Sequence[Line], dev: Sequence[Line]) -> Curve | None:
    """The losses that add up to the total, where there is more than one."""
    names = [name for name in LOSSES[1:] if points(train, name)]
    if len(names) < 2:
        return None
    return _curve("Losses by objective", _losses(train, dev, names), f"training losses {', '.join(names)}")


def _recalls(dev: Sequence[Line]) -> list[Series]:
    keys = sorted({m.groups() for line in dev for m in map(RECALL.match, line) if m}, key=lambda k: (int(k[1]), k[0]))
    depths = sorted({int(depth) for _, depth in keys})
    names = {"i2t": "image to text", "t2i": "text to image"}
    return [
        Series(f"{names[way]} @{k}", points(dev, f"{way}_r{k}"), False, depths.index(int(k)), way == "t2i")
        for way, k in keys
    ]


def _curve(title: str, series: Sequence[Series], what: str) -> Curve | None:
    drawn = [s for s in series if s.points]
    if not drawn:
        return None
    ends = "; ".join(f"{s.label} from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in drawn)
    return Curve(title, _svg(drawn), f"Curve of {what} over steps: {ends}.")


def _svg(series: Sequence[Series]) -> str:
    import matplotlib

    style: dict[Any, Any] = {
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.formatter.limits": (-3, 6),
        "svg.fonttype": "none",  # real text: it takes the page's font and colour
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "axes.edgecolor": _GRID,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "blip2",
    }
    with matplotlib.rc_context(style):
        return _page_ready(_drawn(series))


def _drawn(series: Sequence[Series]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.7, 3.1), layout="constrained")
    FigureCanvasSVG(figure)  # a canvas of its own: pyplot's state and backend stay as they are
    axes = figure.add_subplot()
    for one in series:
        color = COLORS[one.color % len(COLORS)]
        line: dict[str, Any] = {"color": color, "linestyle": "--" if one.dashed else "-", "label": one.label}
        x, y = zip(*thinned(one.points), strict=True)
        if one.smooth and len(x) > 1:
            axes.plot(x, y, color=color, alpha=0.25, linewidth=0.9)
            axes.plot(x, smoothed(y, max(1, len(y) // 25)), linewidth=1.8, **line)
        else:
            marker = "o" if len(x) <= 30 else None
            axes.plot(x, y, linewidth=1.8, marker=marker, markersize=3.5, **line)
    axes.grid(True)
    axes.set_xlabel("step")
    axes.margins(x=0.02)
    if len(series) > 1:
        # Under the axes, where no curve can run through it.
        figure.legend(frameon=False, fontsize=8, ncols=2 if len(series) in (2, 4) else 3, loc="outside lower center")
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()


def _page_ready(svg: str) -> str:
    """Only the <svg> element, without namespaces, fixed size or repeated ids, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[a-zA-Z_\d.]+">', "<g>", svg)
    return svg.replace(_TEXT, "currentColor").replace(_GRID, "var(--line)").replace("xlink:href", "href")
