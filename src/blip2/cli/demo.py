"""`blip2 demo`: the packaged tiny model captions, questions and searches a few images."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.cli.options import Commands
from blip2.errors import RunError

if TYPE_CHECKING:
    from PIL import Image

    from blip2.data.collection import Sample
    from blip2.explain.attention import Attention
    from blip2.inference import Blip2
    from blip2.search.query import Hit

MODEL = "tiny"
QUESTIONS = ("Who is in the picture?", "What animal is in the picture?", "Where was the picture taken?")
# What the images of scikit-image show; others are searched for what Flickr8k is full of.
SAMPLE_SEARCHES = ("a cat", "a cup of coffee", "a woman smiling at the camera", "a motorcycle", "a rocket in the sky")
SEARCHES = ("a dog running", "a smiling person", "people on a street", "water", "a child playing")
_LIMIT = 24  # images; a demo is over in two minutes
_WORDS_SHOWN = 6
_LARGE, _SMALL = 320, 112  # sides of images, and of the maps of words, in pixels
_SMALL_WORDS = {"the", "and", "are", "its", "his", "her", "with", "for", "from", "that", "this", "into"}


@dataclass
class Described:
    """One image and what the model made of it."""

    sample: Sample
    image: Image.Image
    caption: str
    answers: tuple[str, ...]
    attention: Attention


def add_parser(commands: Commands) -> None:
    """`blip2 demo`."""
    demo = commands.add_parser("demo", help="caption, question and search images with the packaged tiny model")
    demo.add_argument("photos", nargs="*", metavar="IMAGES", help="folders or files (default: those in scikit-image)")
    demo.add_argument("--out", default="runs/demo", help="folder of report and index (default: %(default)s)")
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Caption, question and search images, and write `report.html` and an index below `options.out`."""
    from blip2.inference import load
    from blip2.training.run_log import format_seconds

    began, folder = time.monotonic(), Path(options.out)
    images = _read(options.photos)
    _say(f"loading {MODEL}: DINOv2-S, its trained Q-Former, SmolLM2-135M (the first time they are converted)")
    model = load(MODEL)
    _say(f"ready after {format_seconds(time.monotonic() - began)}\n")
    described = [_describe(model, sample, image) for sample, image in images]
    index = folder / "photos.index"
    searches = _search(model, index, [sample for sample, _ in images], SEARCHES if options.photos else SAMPLE_SEARCHES)
    for text, hits in searches.items():
        _say(f'search "{text}": ' + ", ".join(f"{hit.key} {hit.parts['text']:.2f}" for hit in hits[:3]))
    report = folder / "report.html"
    _write(report, model, described, searches)
    _say("")
    print(f"done in {format_seconds(time.monotonic() - began)}; look at {report}")
    print(
        f'more:  blip2 search {index} "two dogs"     blip2 ask IMAGE "Is there a dog in the picture?"     blip2 serve'
    )
    print("train one on your own images:  blip2 train tiny/stage1 --data FOLDER     (see the README)")
    return 0


def _read(names: list[str]) -> list[tuple[Sample, Image.Image]]:
    from blip2.data.collection import BadSampleError
    from blip2.data.images import decode_image
    from blip2.search.build import list_samples

    data = list_samples(names or ["skimage"])
    for refused in data.bad:
        _say(f"left out: {refused.path}: {refused.reason}")
    images: list[tuple[Sample, Image.Image]] = []
    for sample in data.samples:
        if len(images) == _LIMIT:
            _say(f"{len(data.samples)} images: the first {_LIMIT} are shown")
            break
        try:
            images.append((sample, decode_image(sample.read())))
        except BadSampleError as error:
            _say(f"left out: {sample.path}: {error.reason}")
    if not images:
        raise RunError(f"{' '.join(names)}: not one image can be read")
    return images


def _describe(model: Blip2, sample: Sample, image: Image.Image) -> Described:
    """Caption, ask and explain; prints the texts."""
    caption = model.caption([image])[0]
    answers = tuple(model.ask_many([image], QUESTIONS)[0])
    _say(f"{sample.key}: {caption}\n    " + "; ".join(f"{q} {a}" for q, a in zip(QUESTIONS, answers, strict=True)))
    return Described(sample, image, caption, answers, model.attend(image))


def _search(model: Blip2, path: Path, samples: list[Sample], texts: tuple[str, ...]) -> dict[str, list[Hit]]:
    """The best hits for each text in a new index."""
    from blip2.search.build import Builder
    from blip2.search.model_id import identify
    from blip2.search.query import Index
    from blip2.search.store import Store

    if (path / "manifest.json").exists():
        shutil.rmtree(path)
    store = Store.create(path, identify(model, MODEL), "faiss", None)
    Builder(store, model, progress=False).add(samples)
    index = Index(store.current(), model)
    return {text: index.search(text, k=5, rerank=0) for text in texts}


def _write(path: Path, model: Blip2, described: list[Described], searches: dict[str, list[Hit]]) -> None:
    from blip2.io.figures import jpeg
    from blip2.io.html import write_page

    jpegs = {entry.sample.key: jpeg(entry.image, _LARGE) for entry in described}
    shown = {text: [(hit, jpegs[hit.key]) for hit in hits if hit.key in jpegs] for text, hits in searches.items()}
    write_page(
        path,
        Path(__file__).with_name("demo.html.j2"),
        images=[_entry(model, entry, jpegs[entry.sample.key]) for entry in described],
        searches=shown,
        queries=model.config.qformer.queries,
    )


def _entry(model: Blip2, described: Described, jpeg: str) -> dict[str, Any]:
    """An image as the page shows it."""
    from blip2.io.figures import encoder_view

    attention = described.attention
    view = encoder_view(described.image, model.image_spec.resize, _LARGE)
    overlays = attention.word_overlays(view.resize((_SMALL, _SMALL)))
    words = [(word, overlay) for word, overlay in overlays if len(word) > 2 and word not in _SMALL_WORDS]
    return {
        "name": described.sample.key,
        "jpeg": jpeg,
        "caption": described.caption,
        "answers": list(zip(QUESTIONS, described.answers, strict=True)),
        "queries": attention.overlay(view, attention.queries.mean(dim=(0, 1))),
        "words": words[:_WORDS_SHOWN],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
