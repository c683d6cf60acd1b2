"""`blip2 explain IMAGE [TEXT]` and `blip2 explain --data DATA`."""

from __future__ import annotations

import argparse

from blip2.cli.options import Commands, add_json, add_model


def add_parser(commands: Commands) -> None:
    """`blip2 explain`: one image, or the queries over a data set."""
    explain = commands.add_parser(
        "explain",
        help="where the queries look, and what the scores with a text depend on",
        description="One image: where each query looks, and what ITC and ITM make of a text. "
        "With --data: what each query specialises in over a data set.",
    )
    explain.add_argument("image", nargs="?", help="not with --data")
    explain.add_argument("text", nargs="?", help="shows what ITC and ITM make of it (needs stage 1)")
    explain.add_argument("--data", metavar="DATA", help="named set, shards, folder or JSONL file (needs stage 1)")
    explain.add_argument("--limit", type=int, metavar="N", help="of --data: first N images only")
    explain.add_argument("--out", metavar="REPORT.html", help="a page with the maps")
    add_json(explain, "one JSON object with all maps")
    add_model(explain)
    explain.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the model looks at; write the page where --out says."""
    from blip2.explain.report import explain_command
    from blip2.inference.loading import load_model

    return explain_command(options, load_model)
