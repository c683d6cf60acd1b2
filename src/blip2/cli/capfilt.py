"""`blip2 capfilt IN OUT`."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

from blip2.cli.options import Commands, add_device, add_json


def add_parser(commands: Commands) -> None:
    """`blip2 capfilt IN OUT`."""
    capfilt = commands.add_parser(
        "capfilt",
        help="caption shards anew, rank all texts against the image, keep the best",
        description="Draws captions of every image, ranks them with the web text by image-text similarity and keeps "
        "the best; shard in, shard out. Run it again and it goes on where it was.",
    )
    capfilt.add_argument("source", metavar="IN", help="shards: folder, glob, brace range or named set")
    capfilt.add_argument("out", metavar="OUT", help="folder of the new shards")
    capfilt.add_argument("--captioner", required=True, metavar="M", help="run, checkpoint, or BLIP of transformers")
    capfilt.add_argument("--ranker", metavar="M", help="run (ITC) or CLIP of transformers (default: the captioner's)")
    for option, parse, default, meaning in (
        ("samples", int, 10, "captions drawn per image; 0 only ranks"),
        ("keep", int, 2, "captions kept per image"),
        ("itm-threshold", float, None, "least ITM probability of a kept text (BLIP: 0.5)"),
        (
            "prompt",
            str,
            None,
            "text that captions continue; {label} is that field of a sample's JSON, and part of the caption",
        ),
        ("top-p", float, 0.9, "of the nucleus sampling"),
        ("temperature", float, 1.0, "of the sampling"),
        ("min-tokens", int, 5, "of a caption"),
        ("max-tokens", int, 20, "of a caption"),
        ("batch", int, 8, "images at a time"),
        ("seed", int, 0, "of the sampling"),
        ("workers", int, 1, "processes, each with its models"),
        ("threads", int, None, "of each process (default: the cores shared equally)"),
    ):
        shown = "" if default is None else f" (default: {default})"
        capfilt.add_argument(f"--{option}", type=parse, default=default, metavar="N", help=meaning + shown)
    add_device(capfilt)
    capfilt.add_argument("--engine", default="local", choices=("local", "ray"), help="default: %(default)s")
    capfilt.add_argument("--part", default="0/1", metavar="I/N", help="every N-th shard from I on, for array jobs")
    add_json(capfilt, "the manifest")
    capfilt.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run CapFilt; the totals go to stdout."""
    from blip2.capfilt.engines import Engine
    from blip2.capfilt.pipeline import capfilt, find_jobs, part_of
    from blip2.capfilt.settings import CapFiltSettings

    settings = CapFiltSettings(**{field.name: getattr(options, field.name) for field in fields(CapFiltSettings)})
    engine = Engine(options.engine, options.workers, options.threads, options.device, progress=not options.json)
    jobs = find_jobs(options.source, options.out)
    manifest = capfilt(part_of(jobs, options.part), jobs, settings, engine)
    print(json.dumps(manifest) if options.json else _summary(manifest, options.out, len(jobs)))
    return 0


def _summary(manifest: dict[str, Any], out: str, count: int) -> str:
    done = len(manifest["shards"])
    lines = [
        f"{out}: {done} of {count} shards, {manifest['samples']} images keep {manifest['web']} web and "
        f"{manifest['synthetic']} synthetic captions; {manifest['rejected']} texts rejected"
    ]
    if manifest["emptied"]:
        lines.append(f"  {manifest['emptied']} images kept no text and were left out")
    if manifest["bad"]:
        lines.append(f"  {manifest['bad']} bad samples were left out (blip2 data check names them)")
    return "\n".join(lines)
