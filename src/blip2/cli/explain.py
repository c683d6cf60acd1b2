"""Command-line options of `blip2 explain`; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Parsers = argparse._SubParsersAction


def add_command(
    commands: Parsers[argparse.ArgumentParser], add_model: Callable[[argparse.ArgumentParser], None]
) -> None:
    """`blip2 explain`: one image, or the queries over a data set."""
    explain = commands.add_parser(
        "explain",
        help="where the queries look, and what the scores with a text depend on",
        description="One image: where each query looks, and what ITC and ITM make of a text. "
        "With --data: what each query specialises in over a data set.",
    )
    explain.add_argument("image", nargs="?", help="a picture; not with --data")
    explain.add_argument("text", nargs="?", help="shows what ITC and ITM make of it (needs stage 1)")
    explain.add_argument("--data", metavar="DATA", help="named set, shards, folder or JSONL file (needs stage 1)")
    explain.add_argument("--limit", type=int, metavar="N", help="of --data: first N images only")
    explain.add_argument("--out", metavar="REPORT.html", help="a page with the maps")
    explain.add_argument("--json", action="store_true", help="one JSON object with all maps on stdout")
    add_model(explain)
    explain.set_defaults(run=_run)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.explain.report import explain_command
    from blip2.inference.loading import load_model

    return explain_command(options, load_model)
