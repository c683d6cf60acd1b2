"""Captions from questions and answers, and the shards made of the `easy-vqa` package."""

from __future__ import annotations

import importlib.util
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from blip2.data import easyvqa
from blip2.data.easyvqa import build_easy_vqa, captions_of
from blip2.data.images import decode_image
from blip2.data.shards.reader import read_shards
from blip2.data.sources import open_collection
from blip2.errors import DataError

# What each colour word looks like, to tell that a caption speaks of this image.
LOOKS = {"red": (255, 0, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "black": (0, 0, 0), "gray": (128, 128, 128)}
LOOKS |= {"green": (0, 255, 0), "teal": (0, 128, 128), "brown": (165, 42, 42)}


@pytest.mark.parametrize(
    ("questions", "first"),
    [
        ([("what color is the shape?", "blue"), ("what shape is present?", "circle")], "a blue circle"),
        ([("what color is the circle?", "blue")], "a blue circle"),
        ([("what is the red shape?", "triangle")], "a red triangle"),
        ([("is there a circle?", "yes"), ("is there a red shape?", "yes")], "a red circle"),
        ([("is there not a circle?", "no"), ("is no red shape present?", "no")], "a red circle"),
        ([("is there a circle?", "no"), ("what color is the shape?", "teal")], "a teal shape"),
        ([("is no circle present?", "yes"), ("what shape is in the image?", "triangle")], "a triangle"),
        ([("does the image not contain a circle?", "yes")], None),
    ],
)
def test_captions_by_hand(questions: list[tuple[str, str]], first: str | None) -> None:
    assert next(iter(captions_of(questions)), None) == first


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("easy-vqa is not installed")
    return build_easy_vqa("test", tmp_path_factory.mktemp("cache") / "easy-vqa")


def test_shards_hold_every_image(built: Path) -> None:
    collection = read_shards("easy", sorted(built.glob("test-*.tar")))
    assert len(collection.samples) == 1000
    assert not collection.bad
    assert sum(bool(sample.captions) for sample in collection.samples) > 950
    assert all(len(question.answers) == 1 for sample in collection.samples for question in sample.questions)
    assert all(sample.questions for sample in collection.samples)
    with tarfile.open(next(built.glob("test-*.tar"))) as tar:
        handle = tar.extractfile(next(m for m in tar if m.name.endswith(".json")))
        assert handle is not None
        entry = json.loads(handle.read())
    assert all(set(question) == {"question", "answers"} for question in entry["qa"])
    assert [p.name for p in built.parent.iterdir()] == ["easy-vqa"]  # nothing temporary is left


def test_captions_name_the_colour_in_the_picture(built: Path) -> None:
    checked = 0
    for sample in read_shards("easy", sorted(built.glob("test-*.tar"))).samples[:100]:
        colors = [word for word in easyvqa.COLORS if any(word in c.split() for c in sample.captions)]
        if not colors:
            continue
        (color,) = colors
        pixels = np.asarray(decode_image(sample.read()), dtype=int).reshape(-1, 3)
        nearest = {word: np.abs(pixels - rgb).sum(1).min() for word, rgb in LOOKS.items()}
        assert nearest[color] < 60, (sample.key, color, nearest)
        checked += 1
    assert checked > 80


def test_built_once_and_found_by_name(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_CACHE", str(built.parent))
    monkeypatch.setattr(easyvqa, "_write", lambda *_: pytest.fail("built again"))
    assert len(open_collection("easy-vqa:test").samples) == 1000


def test_missing_package_and_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    if importlib.util.find_spec("easy_vqa") is not None:
        with pytest.raises(DataError, match="cannot be written"):
            build_easy_vqa("test", tmp_path / "file" / "easy-vqa")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match="easy-vqa: not installed: pip install"):
        build_easy_vqa("test", tmp_path / "easy-vqa")
