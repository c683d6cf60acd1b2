"""How the time and memory of our stage-1 training step grow with batch, queries, text length and patches.

Each point runs in a process of its own; the exponent is the slope of log time over log size between the
upper half of the points. The plot stands beside the result files.

    python -m benchmarks.claims.growth [--size tiny] [--repeats 2]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.common import (
    ROOT,
    Peer,
    Size,
    captions,
    features,
    parse,
    run_script,
    settings_of,
    show,
    sized,
    working,
)
from benchmarks.sides.models import write_stage1

AXES = {
    "paper": {
        "batch": (2, 4, 8, 16),
        "queries": (8, 16, 32, 64),
        "text": (8, 16, 32, 64),
        "patches": (65, 129, 257, 577),
    },
    "tiny": {"batch": (2, 8), "patches": (17, 65)},
}
BASE_BATCH = 4
SIDE = Peer("benchmarks.sides.ours:growth_step")


def main() -> None:
    """Measure every point, plot, and print one JSON line."""
    options = parse(__doc__, repeats=2)
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis, values in AXES[options.size].items():
        axes[axis] = []
        for value in values:
            size = changed(sized(options, batch=BASE_BATCH), axis, value)
            axes[axis].append({axis: value, **measured(size, options)})
            print(f"{axis} {value}: {axes[axis][-1]}", file=sys.stderr)
    exponents = {axis: {kind: exponent(points, axis, kind) for kind in ("s", "mb")} for axis, points in axes.items()}
    path = ROOT / "benchmarks" / "results" / f"{datetime.now(UTC):%Y-%m-%d}-growth-{options.size}.png"
    draw(axes, exponents, path)
    show(
        {
            "claim": "growth of the stage-1 step",
            "target": None,
            "size": f"{sized(options, batch=BASE_BATCH)}, one of its sizes changed at a time; full-length text",
            "threads": options.threads,
            "device": options.device,
            "exponents": exponents,
            "points": axes,
            "plot": path.name,
        }
    )


def changed(size: Size, axis: str, value: int) -> Size:
    """The size with one axis set; text is of one length, so that the axis is what it says."""
    if axis == "text":
        return replace(size, mean_text=value, max_text=value, positions=max(size.positions, value))
    return replace(size, **{axis: value})


def measured(size: Size, options: Any) -> dict[str, float]:
    """Median seconds and peak MB of a step."""
    with tempfile.TemporaryDirectory() as folder:
        write_stage1(folder, size)
        inputs = {"features": features(size.batch, size).numpy(), "captions": captions(size.batch, size)}
        np.savez(Path(folder) / "inputs.npz", **inputs)
        with working({"ours": SIDE}, settings_of(options, size, folder, gradients=False)) as workers:
            worker = workers["ours"]
            worker.ask(do="time")
            worker.ask(do="forget")
            times = [worker.ask(do="time")["seconds"] for _ in range(options.repeats)]
            peak = worker.ask(do="peak")["peak_mb"]
    return {"s": round(statistics.median(times), 4), "mb": round(peak)}


def exponent(points: list[dict[str, Any]], axis: str, kind: str) -> float:
    """Slope of log(kind) over log(axis), least squares over the upper half of the points."""
    upper = points[-max(2, (len(points) + 1) // 2) :]
    x, y = (np.log([point[name] for point in upper]) for name in (axis, kind))
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def draw(axes: dict[str, list[dict[str, Any]]], exponents: dict[str, dict[str, float]], path: Path) -> None:
    """Seconds above, on logarithmic axes; memory below, from zero. One column per axis, one scale per row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator, ScalarFormatter

    size = (2.6 * len(axes), 5)
    figure, grid = pyplot.subplots(2, len(axes), figsize=size, sharex="col", sharey="row", squeeze=False)
    grid[0][0].set_ylabel("seconds a step")
    grid[1][0].set_ylabel("peak MB")
    for column, (axis, points) in enumerate(axes.items()):
        values = [point[axis] for point in points]
        above, below = grid[0][column], grid[1][column]
        above.plot(values, [point["s"] for point in points], "o-")
        above.set_yscale("log", base=2)
        above.yaxis.set_major_formatter(ScalarFormatter())
        below.plot(values, [point["mb"] for point in points], "o-")
        below.set_ylim(bottom=0)
        below.set_xscale("log", base=2)
        below.set_xticks(values, [str(value) for value in values])
        below.xaxis.set_minor_locator(NullLocator())
        below.set_xlabel(axis)
        for plot, kind in ((above, "s"), (below, "mb")):
            plot.set_title(f"grows with {axis}^{exponents[axis][kind]}", fontsize=9)
            plot.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    run_script(main)
