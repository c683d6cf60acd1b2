"""`blip2 convert SRC DST --to FORMAT`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from blip2.cli.options import Commands, add_json, add_towers

_NAMES = {"blip2": "a run of ours", "hf": "a Hugging Face checkpoint", "lavis": "a LAVIS checkpoint"}


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
        "--stage1",
        nargs="?",
        const="",
        metavar="RUN",
        help="blip2, slim: take the stage 1 along that embeddings and matches come from (default: the one it began "
        "from); slim: or name a folder beside it",
    )
    add_json(convert)
    add_towers(convert)
    convert.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, read back and compare."""
    from tqdm import tqdm

    from blip2.weights.convert.pipeline import convert, require_possible
    from blip2.weights.formats import open_checkpoint

    checkpoint = open_checkpoint(options.source, vision=options.vision, language=options.language)
    require_possible(checkpoint, Path(options.target), options.to)
    print(f"{checkpoint.source}: {_NAMES[checkpoint.format]}, {checkpoint.config.stage}", file=sys.stderr)
    with tqdm(unit="B", unit_scale=True, desc="writing and reading back") as bar:
        written = convert(
            checkpoint, options.target, options.to, bar.update, words=options.words, stage1=options.stage1
        )
    if options.json:
        summary = {
            "source": str(options.source),
            "target": str(written.target),
            "from": checkpoint.format,
            "to": options.to,
            "stage": checkpoint.config.stage,
            "tensors": written.tensors,
            "bytes": written.nbytes,
            "notes": list(written.notes),
        }
        print(json.dumps(summary))
        return 0
    print(f"{written.target}: {written.tensors} tensors, {written.nbytes / 1e6:.1f} MB, each read back and equal")
    for note in written.notes:
        print(f"  {note}")
    return 0
