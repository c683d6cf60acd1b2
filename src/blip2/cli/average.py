"""`blip2 average DST RUN RUN ...`."""

from __future__ import annotations

import argparse
import sys

from blip2.cli.options import Commands


def add_parser(commands: Commands) -> None:
    """`blip2 average`."""
    average = commands.add_parser("average", help="the mean of runs of one model, as one run (model soups)")
    average.add_argument("target", metavar="DST", help="new folder")
    average.add_argument("runs", nargs="+", metavar="RUN", help="two or more")
    average.add_argument("--weights", nargs="+", type=float, metavar="W", help="how much each counts (default: alike)")
    average.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the mean."""
    from blip2.weights.convert.average import average

    target = average(options.runs, options.target, options.weights)
    print(f"{target}: the mean of {len(options.runs)} runs", file=sys.stderr)
    return 0
