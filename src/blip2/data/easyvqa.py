"""The `easy-vqa` package (5,000 images of one coloured shape, 48k questions) as captioned shards."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blip2.data.shards.writer import write_shard
from blip2.errors import DataError, os_error_as

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("green", "red", "gray", "teal", "black", "yellow", "brown", "blue")
_TEMPLATES = ("a {0} {1}", "a picture of a {0} {1}", "there is a {0} {1} in the picture", "the {1} is {0}")
_PER_SHARD = 1000


def build_easy_vqa(split: str, folder: Path) -> Path:
    """Write a split's shards below `folder`, once; returns the folder that holds them.

    Each sample has captions made from what its questions say ("a blue rectangle"), and `qa`, its
    questions and answers.

    Raises:
        DataError: the package is not installed, or the folder cannot be made.
        RunError: a shard cannot be written.
    """
    if (folder / f"{split}-00000.tar").exists():
        return folder
    package = importlib.util.find_spec("easy_vqa")
    if package is None or not package.submodule_search_locations:
        raise DataError("easy-vqa: not installed: pip install --no-deps easy-vqa==1.0")
    source = Path(package.submodule_search_locations[0]) / "data" / split
    if not (source / "questions.json").is_file():
        raise DataError(f"{source}: the easy-vqa package has no questions.json here: install easy-vqa==1.0")
    with os_error_as(DataError, f"{folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    _write(source, folder, split)
    return folder


def captions_of(questions: list[tuple[str, str]]) -> list[str]:
    """Captions from an image's questions and answers; empty where they name neither shape nor colour."""
    words: list[str] = []
    for question, answer in questions:
        # "what color is the circle?" names the shape as well.
        if answer not in ("yes", "no") or _affirms(question, answer):
            words += re.findall(r"[a-z]+", f"{question} {answer}".lower())
    shape = next((word for word in words if word in SHAPES), None)
    color = next((word for word in words if word in COLORS), None)
    if shape and color:
        return [template.format(color, shape) for template in _TEMPLATES]
    if shape:
        return [f"a {shape}", f"there is a {shape} in the picture"]
    return [f"a {color} shape", f"the shape is {color}"] if color else []


def _affirms(question: str, answer: str) -> bool:
    """Whether the answer says that what the question names is there ("is no circle present?": "no")."""
    denies = re.search(r"\b(no|not)\b", question) is not None
    return answer in ("yes", "no") and (answer == "yes") != denies


def _write(source: Path, folder: Path, split: str) -> None:
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((source / "questions.json").read_text("utf-8")):
        questions.setdefault(int(image), []).append((str(question), str(answer)))
    # Images come in no meaningful order; a seeded one makes the first N of them a fair sample.
    order = [int(i) for i in np.random.default_rng(0).permutation(sorted(questions))]

    def samples(images: list[int]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        for image in images:
            key = f"{split}-{image:05d}"
            qa = [{"question": question, "answers": [answer]} for question, answer in questions[image]]
            entry = {"image_id": key, "captions": captions_of(questions[image]), "qa": qa}
            yield key, (source / "images" / f"{image}.png").read_bytes(), entry

    # The first shard is written last: where it is, all are.
    for start in reversed(range(0, len(order), _PER_SHARD)):
        write_shard(folder / f"{split}-{start // _PER_SHARD:05d}.tar", samples(order[start : start + _PER_SHARD]))
