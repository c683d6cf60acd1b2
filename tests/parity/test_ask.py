"""Several questions about one picture: the answers of asking one at a time, on tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blip2

HF = Callable[[str], tuple[Path, Any]]
QUESTIONS = ["what is it?", "how many?", "a dog or two cats on the red sofa?"]


def pictures(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return [folder / f"{n}.png" for n in range(3)]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_repeated_pictures_are_encoded_once(kind: str, hf: HF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = blip2.load(str(hf(kind)[0]), dtype="fp32")
    model.batch = 2
    first, second, third = pictures(tmp_path)
    asked = [first, third.read_bytes(), first, Image.open(second), third.read_bytes(), first, str(first)]
    questions = (QUESTIONS * 3)[: len(asked)]
    options: dict[str, Any] = {"beams": 3, "min_tokens": 2, "max_tokens": 5}
    alone = [model.ask([a], [q], **options)[0] for a, q in zip(asked, questions, strict=True)]
    encoded = []
    forward = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda pixels: (encoded.append(len(pixels)), forward(pixels))[1])
    assert model.ask(asked, questions, **options) == alone
    assert encoded == [2, 1]
    assert len(set(alone)) > 1


def test_every_question_about_every_picture(hf: HF, tmp_path: Path) -> None:
    model = blip2.load(str(hf("opt")[0]), dtype="fp32")
    paths = pictures(tmp_path)
    found = model.ask_many(paths, QUESTIONS, min_tokens=2, max_tokens=5)
    assert found == [[model.ask(p, q, min_tokens=2, max_tokens=5)[0] for q in QUESTIONS] for p in paths]
    assert model.ask_many(paths[0], QUESTIONS, min_tokens=2, max_tokens=5) == found[:1]
