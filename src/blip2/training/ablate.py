"""`blip2 ablate`: what stage 1, ITM, ITG and the Q-Former contribute on equal budgets, as a table and a plot."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from blip2.configs import RunConfig
from blip2.data.sources import NAMED, open_collection
from blip2.errors import ConfigError
from blip2.io.atomic import replacing, write_json, write_text
from blip2.recipes.ablations import Variant, variants
from blip2.training.report import points, read_run
from blip2.training.run import train
from blip2.training.run_log import format_seconds

TABLE, NUMBERS, PLOT = "ablations.md", "ablations.json", "ablations.png"


@dataclass(frozen=True)
class Row:
    """The results of a variant.

    Args:
        recall: mean of ITC's R@10 in both directions after stage 1, in percent; None without stage 1.
        curve: (step, dev loss) of stage 2; `loss` is the last.
        cider: of captions of all dev images after stage 2.
        seconds: of both stages.
    """

    name: str
    asks: str
    recall: float | None
    curve: list[tuple[float, float]]
    loss: float
    cider: float
    seconds: float


def ablate_command(options: argparse.Namespace) -> int:
    """Run every variant, resuming those that an earlier call began; then write the table and the plot."""
    chosen = _chosen(options)
    folder, began = Path(options.out), time.monotonic()
    for number, variant in enumerate(chosen, 1):
        print(f"\n== {number}/{len(chosen)} {variant.name}: {variant.asks}", file=sys.stderr, flush=True)
        for config in _runs(variant, folder, options.data):
            code = train(config)
            if code:
                print(f"stopped; go on with the same command (runs are in {folder})", file=sys.stderr)
                return code
    rows = [_row(variant, folder) for variant in chosen]
    table = _table(rows, chosen)
    write_json(folder / NUMBERS, [vars(row) for row in rows])
    write_text(folder / TABLE, table)
    _plot(rows, folder / PLOT)
    out = sys.stderr if options.json else sys.stdout
    print(f"\n{table}\n{folder / TABLE}, {folder / PLOT}", file=out)
    print(f"done in {format_seconds(time.monotonic() - began)}", file=out)
    if options.json:
        print(json.dumps([vars(row) for row in rows]))
    return 0


def _chosen(options: argparse.Namespace) -> list[Variant]:
    """The variants asked for, once the data is known to be there."""
    if options.base != "tiny":
        raise ConfigError(f"no ablations of {options.base!r}: there are those of tiny")
    for name in ("steps1", "steps2", "images"):
        if getattr(options, name) < 2:
            raise ConfigError(f"--{name} is {getattr(options, name)}: it must be 2 or more")
    known = variants(steps1=options.steps1, steps2=options.steps2, images=options.images)
    chosen = [name for name in (options.only or "").split(",") if name]
    unknown = [name for name in chosen if name not in {variant.name for variant in known}]
    if unknown:
        raise ConfigError(f"--only names {unknown[0]!r}; variants: {', '.join(v.name for v in known)}")
    for split in ("train", "dev"):
        open_collection(_split(options.data, split))
    return [variant for variant in known if not chosen or variant.name in chosen]


def _split(data: str, split: str) -> str:
    """A named set's split, or one of a folder's: DATA/train, DATA/dev."""
    return f"{data}:{split}" if any(name.startswith(f"{data}:") for name in NAMED) else str(Path(data) / split)


def _runs(variant: Variant, folder: Path, data: str) -> list[RunConfig]:
    """The runs of a variant in order, each with its place."""

    def placed(config: RunConfig, stage: str, init: str | None) -> RunConfig:
        sets = replace(config.data, train=_split(data, "train"), dev=_split(data, "dev"))
        out = str(folder / f"{variant.name}-{stage}")
        return replace(config, recipe=f"ablate/{variant.name}-{stage}", data=sets, out=out, init=init)

    if variant.stage1 is None:
        return [placed(variant.stage2, "stage2", None)]
    first = placed(variant.stage1, "stage1", None)
    return [first, placed(variant.stage2, "stage2", first.out)]


def _row(variant: Variant, folder: Path) -> Row:
    second = read_run(folder / f"{variant.name}-stage2")
    recall, seconds = None, second.seconds
    if variant.stage1 is not None:
        first = read_run(folder / f"{variant.name}-stage1")
        recall, seconds = (first.dev[-1]["i2t_r10"] + first.dev[-1]["t2i_r10"]) / 2, seconds + first.seconds
    curve, last = points(second.dev, "loss"), second.dev[-1]
    return Row(variant.name, variant.asks, recall, curve, last["loss"], last["cider"], seconds)


def _table(rows: list[Row], chosen: list[Variant]) -> str:
    """The table as Markdown."""
    lines = [
        "| variant | asks | pairs seen | ITC R@10 after stage 1 | dev loss of stage 2 | CIDEr | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, variant in zip(rows, chosen, strict=True):
        runs = [run for run in (variant.stage1, variant.stage2) if run is not None]
        pairs = " + ".join(f"{run.train.steps * run.train.batch * run.data.texts_per_image:,}" for run in runs)
        recall = "" if row.recall is None else f"{row.recall:.1f}"
        figures = f"{pairs} | {recall} | {row.loss:.3f} | {row.cider:.1f} | {row.seconds / 60:.0f}"
        lines.append(f"| {row.name} | {row.asks} | {figures} |")
    return "\n".join([*lines, ""])


def _plot(rows: list[Row], target: Path) -> None:
    """Dev loss of stage 2 against its steps, a line per variant; beside it CIDEr in the end, a bar each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, row in enumerate(rows):
        steps, losses = zip(*row.curve, strict=True)
        left.plot(steps, losses, marker="o", markersize=3, label=row.name, color=f"C{number}")
        right.barh(row.name, row.cider, color=f"C{number}")
    left.set(xlabel="steps of stage 2", ylabel="dev loss (nats per token)", yscale="log")
    for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis(ScalarFormatter())
    left.legend(frameon=False)
    left.grid(alpha=0.3)
    right.invert_yaxis()
    right.set(xlabel="CIDEr of dev captions after stage 2 (percent)")
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
