"""Command-line options of `blip2 capfilt`; imports nothing heavy."""

from __future__ import annotations

import argparse

Parsers = argparse._SubParsersAction


def add_command(commands: Parsers[argparse.ArgumentParser]) -> None:
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
    for option, kind, default, what in (
        ("samples", int, 10, "captions drawn per image; 0 only ranks"),
        ("keep", int, 2, "captions kept per image"),
        ("itm-threshold", float, None, "least ITM probability of a kept text (BLIP: 0.5)"),
        ("prompt", str, None, "text that captions continue"),
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
        capfilt.add_argument(f"--{option}", type=kind, default=default, metavar="N", help=what + shown)
    capfilt.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the frozen towers")
    capfilt.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    capfilt.add_argument("--engine", default="local", choices=("local", "ray"), help="default: %(default)s")
    capfilt.add_argument("--part", default="0/1", metavar="I/N", help="every N-th shard from I on, for array jobs")
    capfilt.add_argument("--json", action="store_true", help="the manifest on stdout")
    capfilt.set_defaults(run=_run)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.capfilt.command import capfilt_command

    return capfilt_command(options)
