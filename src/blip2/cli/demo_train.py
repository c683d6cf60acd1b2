"""`blip2 demo-train`: both stages on embedded defaults, then captions of images never seen."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from blip2.cli.options import Commands
from blip2.errors import DataError

if TYPE_CHECKING:
    from blip2.data.collection import Collection
    from blip2.inference import Blip2

IMAGES = 6


def add_parser(commands: Commands) -> None:
    """`blip2 demo-train`."""
    demo = commands.add_parser("demo-train", help="train both stages on embedded defaults (about 10 minutes)")
    demo.add_argument("--out", default="runs/demo-train", help="folder of the two runs (default: %(default)s)")
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train `tiny/demo-stage1` and `tiny/demo-stage2` below `options.out`, or go on with what is there.

    Flickr8k is used where it is installed, else the shapes of the PyPI package `easy-vqa`.
    """
    from blip2.inference import load
    from blip2.recipes import recipe
    from blip2.training.report import write_report
    from blip2.training.run import train
    from blip2.training.run_log import format_seconds

    began = time.monotonic()
    folder = Path(options.out)
    flickr8k = _has_flickr8k()
    for stage in ("stage1", "stage2"):
        config = recipe(f"tiny/demo-{stage}")
        if not flickr8k:
            config = replace(config, data=replace(config.data, train="easy-vqa:train", dev="easy-vqa:test"))
        config = replace(config, init=str(folder / "stage1") if stage == "stage2" else None, out=str(folder / stage))
        _say(f"\n== {stage}: {config.data.train}, {config.train.steps} steps of {config.train.batch} pairs")
        code = train(config)
        if code:
            return code
    model = load(folder / "stage2")
    unseen = _unseen(flickr8k)
    _say(f"\n== captions of {unseen.name}, never seen in training")
    _show(load(folder / "stage1"), model, unseen, folder / "captioned")
    print(f"\ndone in {format_seconds(time.monotonic() - began)}; the report: {write_report(folder / 'stage2')}")
    print(f"now try: blip2 caption YOUR_IMAGE.jpg --model {folder / 'stage2'}")
    return 0


def _has_flickr8k() -> bool:
    from blip2.data.sources import open_collection

    try:
        open_collection("flickr8k:train")
    except DataError:
        return False
    return True


def _unseen(flickr8k: bool) -> Collection:
    """Dev images beyond those of the dev evaluations, else scikit-image's samples."""
    from blip2.data.collection import Collection
    from blip2.data.sources import open_collection

    if not flickr8k:
        return open_collection("skimage").limited(IMAGES)
    dev = open_collection("flickr8k:dev")
    return Collection("flickr8k:dev", dev.samples[-IMAGES:], [])


def _show(stage1: Blip2, stage2: Blip2, unseen: Collection, folder: Path) -> None:
    """Print the captions of both stages, and write the images' thumbnails to `folder`."""
    from blip2.training.validation import write_thumbnail

    images = [sample.read() for sample in unseen.samples]
    folder.mkdir(parents=True, exist_ok=True)
    for sample, first, second in zip(unseen.samples, stage1.caption(images), stage2.caption(images), strict=True):
        thumbnail = folder / f"{Path(sample.key).stem}.jpg"
        write_thumbnail(sample, thumbnail)
        print(thumbnail)
        print(f"    stage 1, by its own text branch: {first}")
        print(f"    stage 2, through the language model: {second}")
        if sample.captions:
            print(f"    a person wrote: {sample.captions[0]}")
    answer = stage2.ask([images[0]], ["What is in the picture?"])[0]
    print(f"{unseen.samples[0].key}: what is in the picture? {answer}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
