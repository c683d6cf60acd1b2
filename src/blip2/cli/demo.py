"""`blip2 demo`: the bridge that comes with the package captions, answers and searches a few photographs."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.data.collection import BadSampleError, Sample
from blip2.data.image_inputs import open_image
from blip2.errors import RunError
from blip2.explain.attention import Attention
from blip2.inference import Blip2, load
from blip2.io.figures import jpeg, overlay, png, seen
from blip2.io.html import environment, write
from blip2.ops.devices import to_numpy
from blip2.search.build import Builder, list_samples
from blip2.search.model_id import identify
from blip2.search.query import Hit, Index
from blip2.search.store import Store
from blip2.training.run_log import format_seconds

MODEL = "tiny"
QUESTIONS = ("Who is in the picture?", "What animal is in the picture?", "Where was the picture taken?")
# What the photographs of scikit-image show; people's own are searched for what Flickr8k is full of.
SAMPLE_SEARCHES = ("a cat", "a cup of coffee", "a woman smiling at the camera", "a motorcycle", "a rocket in the sky")
SEARCHES = ("a dog running", "a smiling person", "people on a street", "water", "a child playing")
_MOST = 24  # photographs; a demo is over in two minutes
_WORDS_SHOWN = 6
_LARGE, _SMALL = 320, 112  # sides of pictures, and of maps of words, in pixels
_SMALL_WORDS = {"the", "and", "are", "its", "his", "her", "with", "for", "from", "that", "this", "into"}


@dataclass
class Seen:
    """One photograph and what was made of it."""

    sample: Sample
    picture: Image.Image
    caption: str = ""
    answers: tuple[str, ...] = ()
    attention: Attention | None = None


def demo(photos: list[str], out: str) -> int:
    """Caption, question and search photographs, and write `report.html` and an index below `out`.

    Args:
        photos: folders, files or data sets; none takes the photographs inside scikit-image.
    """
    began, folder = time.monotonic(), Path(out)
    shown = _read(photos)
    _say(f"loading {MODEL}: DINOv2-S, its trained Q-Former, SmolLM2-135M (the first time they are converted)")
    model = load(MODEL)
    _say(f"ready after {format_seconds(time.monotonic() - began)}\n")
    _look(model, shown)
    searches = SEARCHES if photos else SAMPLE_SEARCHES
    index = folder / "photos.index"
    found = _search(model, index, [one.sample for one in shown], searches)
    for text, hits in found.items():
        _say(f'search "{text}": ' + ", ".join(f"{hit.key} {hit.parts['text']:.2f}" for hit in hits[:3]))
    report = folder / "report.html"
    _write(report, model, shown, found)
    _say("")
    print(f"done in {format_seconds(time.monotonic() - began)}; look at {report}")
    print(
        f'more:  blip2 search {index} "two dogs"     blip2 ask PHOTO "Is there a dog in the picture?"     blip2 serve'
    )
    print("train one on your own pictures:  blip2 train tiny/stage1 --data FOLDER     (README: Train your own bridge)")
    return 0


def _read(photos: list[str]) -> list[Seen]:
    samples, bad = list_samples(photos or ["skimage"])
    for one in bad:
        _say(f"left out: {one.path}: {one.reason}")
    shown: list[Seen] = []
    for sample in samples:
        if len(shown) == _MOST:
            _say(f"{len(samples)} photographs: the first {_MOST} are shown")
            break
        try:
            shown.append(Seen(sample, open_image(sample.read())))
        except BadSampleError as error:
            _say(f"left out: {sample.path}: {error.reason}")
    if not shown:
        raise RunError(f"{' '.join(photos)}: not one picture can be read")
    return shown


def _look(model: Blip2, shown: list[Seen]) -> None:
    """Caption, ask and explain; prints as it goes."""
    for one in shown:
        one.caption = model.caption([one.picture])[0]
        one.answers = tuple(model.ask_many([one.picture], QUESTIONS)[0])
        one.attention = model.attend(one.picture)
        asked = "; ".join(f"{q} {a}" for q, a in zip(QUESTIONS, one.answers, strict=True))
        _say(f"{one.sample.key}: {one.caption}\n    {asked}")


def _search(model: Blip2, path: Path, samples: list[Sample], texts: tuple[str, ...]) -> dict[str, list[Hit]]:
    """The best hits for each text in an index made anew."""
    if (path / "manifest.json").exists():
        shutil.rmtree(path)
    store = Store.create(path, identify(model, MODEL), "faiss", None)
    Builder(store, model, progress=False).add(samples)
    index = Index(store.current(), model)
    return {text: index.search(text, k=5, rerank=0) for text in texts}


def _write(path: Path, model: Blip2, shown: list[Seen], found: dict[str, list[Hit]]) -> None:
    pictures = {one.sample.key: jpeg(one.picture, _LARGE) for one in shown}
    page = (
        environment(Path(__file__).parent)
        .get_template("demo.html.j2")
        .render(
            photos=[_entry(model, one, pictures[one.sample.key]) for one in shown],
            searches=[
                (text, [(hit, pictures.get(hit.key)) for hit in hits if hit.key in pictures])
                for text, hits in found.items()
            ],
            queries=model.config.qformer.queries,
        )
    )
    write(path, page)


def _entry(model: Blip2, one: Seen, picture: str) -> dict[str, Any]:
    """A photograph as the page shows it."""
    found = one.attention
    assert found is not None
    assert found.words is not None
    assert found.word_maps is not None
    view = seen(one.picture, model.image_spec.resize, _LARGE)
    whole = png(overlay(view, to_numpy(found.heatmap(found.queries.mean(dim=(0, 1))))))
    words = [
        (word.strip(), png(overlay(view.resize((_SMALL, _SMALL)), to_numpy(found.heatmap(map_P)))))
        for word, map_P in zip(found.words, found.word_maps, strict=True)
        if len(word.strip()) > 2 and word.strip() not in _SMALL_WORDS
    ]
    return {
        "name": one.sample.key,
        "image": picture,
        "caption": one.caption,
        "answers": list(zip(QUESTIONS, one.answers, strict=True)),
        "queries": whole,
        "words": words[:_WORDS_SHOWN],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
