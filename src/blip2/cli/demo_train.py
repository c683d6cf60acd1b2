"""`blip2 demo-train`: both stages on embedded defaults, then captions of photographs never seen."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from blip2.configs import DataConfig, RunConfig
from blip2.data.collection import Collection
from blip2.data.image_formats import SUFFIXES
from blip2.data.sources import open_collection
from blip2.errors import DataError
from blip2.inference import Blip2, load
from blip2.recipes import recipe
from blip2.training.report import write_report
from blip2.training.run import train
from blip2.training.run_log import format_seconds
from blip2.training.validation import write_thumbnail

PICTURES = 6


def demo_train(out: str) -> int:
    """Train `tiny/demo-stage1` and `tiny/demo-stage2` below `out`, resumed where they are there.

    Flickr8k is used where it is found, else the shapes of the PyPI package `easy-vqa`.
    """
    began = time.monotonic()
    folder = Path(out)
    photographs = _has_flickr8k()
    for stage in ("stage1", "stage2"):
        config = _config(recipe(f"tiny/demo-{stage}"), folder, photographs)
        print(
            f"\n== {stage}: {config.data.train}, {config.train.steps} steps of {config.train.batch} pairs",
            file=sys.stderr,
            flush=True,
        )
        code = train(config)
        if code:
            return code
    model = load(folder / "stage2")
    unseen = _unseen(photographs)
    print(f"\n== captions of {unseen.name}, never seen in training", file=sys.stderr, flush=True)
    _show(model, unseen, folder)
    print(f"\ndone in {format_seconds(time.monotonic() - began)}; the report: {write_report(folder / 'stage2')}")
    print(f"now try: blip2 caption YOUR_PHOTO.jpg --model {folder / 'stage2'}")
    return 0


def _has_flickr8k() -> bool:
    try:
        open_collection("flickr8k:train")
    except DataError:
        return False
    return True


def _config(base: RunConfig, folder: Path, photographs: bool) -> RunConfig:
    stage = base.stage
    data: DataConfig = base.data
    if not photographs:
        data = replace(data, train="easy-vqa:train", dev="easy-vqa:test")
    init = str(folder / "stage1") if stage == "stage2" else None
    return replace(base, data=data, init=init, out=str(folder / stage))


def _unseen(photographs: bool) -> Collection:
    """Dev photographs beyond those that the runs looked at, else scikit-image's samples."""
    if not photographs:
        return open_collection("skimage").limited(PICTURES)
    dev = open_collection("flickr8k:dev")
    return Collection("flickr8k:dev", dev.samples[-PICTURES:], [])


def _show(model: Blip2, unseen: Collection, folder: Path) -> None:
    pixels = [sample.read() for sample in unseen.samples]
    first, second = load(folder / "stage1").caption(pixels), model.caption(pixels)
    pictures = folder / "captioned"
    pictures.mkdir(parents=True, exist_ok=True)
    for sample, before, caption in zip(unseen.samples, first, second, strict=True):
        name = Path(sample.key).name
        target = pictures / (name if Path(name).suffix.lower() in SUFFIXES else f"{name}.jpg")
        write_thumbnail(sample, target.with_suffix(".jpg"))
        print(f"{target.with_suffix('.jpg')}")
        print(f"    stage 1, by its own text branch: {before}")
        print(f"    stage 2, through the language model: {caption}")
        if sample.captions:
            print(f"    a person wrote: {sample.captions[0]}")
    answer = model.ask([unseen.samples[0].read()], ["What is in the picture?"])[0]
    print(f"{unseen.samples[0].key}: what is in the picture? {answer}")
