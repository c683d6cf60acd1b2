"""`blip2 convert SRC DST --to FORMAT`."""

from __future__ import annotations

import argparse

from blip2.cli.options import Commands, add_json, add_towers


def add_parser(commands: Commands) -> None:
    """`blip2 convert`."""
    convert = commands.add_parser(
        "convert",
        help="write a checkpoint as a run of ours, for transformers, or for LAVIS",
        description="Reads a run of ours, a Hugging Face folder or hub id, or a LAVIS .pth; writes any of the three, "
        "reads it back and compares every tensor.",
    )
    convert.add_argument("source", metavar="SRC", help="run, Hugging Face folder or hub id, preset, or LAVIS .pth")
    convert.add_argument("target", metavar="DST", help="new folder (.pth file for lavis)")
    convert.add_argument(
        "--to", required=True, choices=("blip2", "hf", "lavis", "slim"), help="slim: a run of ours to hand on, in bf16"
    )
    convert.add_argument(
        "--words", metavar="DATA", help="slim: only embeddings of words that recur in the captions of DATA"
    )
    convert.add_argument(
        "--stage1", metavar="NAME", help="slim: folder beside it that embeddings and matches come from"
    )
    add_json(convert)
    add_towers(convert)
    convert.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, read back and compare."""
    from blip2.weights.convert.pipeline import convert_command

    return convert_command(options)
