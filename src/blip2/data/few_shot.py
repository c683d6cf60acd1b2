"""Examples to put in front of a question: of a file, or drawn from a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip2.data.collection import BadSampleError, Collection
from blip2.data.entries import numbered_lines, parse_json, with_usual_names
from blip2.errors import ConfigError, DataError


@dataclass(frozen=True)
class Shot:
    """An image with its text, shown to the model as an example.

    Args:
        image: path, bytes or Pillow image.
        text: the answer, or a caption where there is no question.
        key: what the example is called in the settings of an evaluation.
    """

    image: Any
    text: str
    question: str | None = None
    key: str = ""


def read_shots(path: str | Path) -> list[Shot]:
    """Examples of a JSONL file: `image` (relative to the file) with `caption`, or with `question` and `answer`.

    Raises:
        DataError: it cannot be read, is empty, or a line is not an example; names the line.
    """
    file = Path(path)
    shots = []
    for number, line in numbered_lines(file):
        try:
            entry = with_usual_names(parse_json(line))
            if not isinstance(entry.get("image"), str):
                raise BadSampleError('no "image"')
            captions = entry.get("captions")
            if "caption" not in entry and captions:
                entry["caption"] = captions[0] if isinstance(captions, list) else captions
            shots.append(as_shot(entry, file.parent))
        except BadSampleError as error:
            raise DataError(f"{file}: line {number}: {error.reason}") from error
    if not shots:
        raise DataError(f"{file}: no examples in it: one JSON object per line")
    return shots


def as_shot(entry: dict[str, Any], folder: Path | None = None) -> Shot:
    """An example of `{"image", "caption"}` or `{"image", "question", "answer"}`.

    Args:
        folder: what a relative path of an image starts from.

    Raises:
        BadSampleError: a field is missing, empty, or of another type.
    """
    image = entry.get("image")
    if isinstance(image, str | Path) and folder is not None:
        image = folder / image
    if not image:
        raise BadSampleError('no "image"')
    names = ("answer", "question") if "question" in entry else ("caption",)
    for name in names:
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise BadSampleError(f'"{name}" is not a text: give "caption", or "question" and "answer"')
    texts = {name: entry[name].strip() for name in names}
    return Shot(image, texts[names[0]], texts.get("question"), str(entry["image"]))


def draw_shots(collection: Collection, count: int, seed: int, *, questions: bool) -> list[Shot]:
    """Examples drawn at random: images without repeats, and of each one caption, or a question and its answer.

    Raises:
        ConfigError: fewer images with such a text than asked for.
        DataError: an image cannot be read.
    """
    rng = np.random.default_rng(seed)
    usable = [
        sample
        for sample in collection.samples
        if (any(q.answers for q in sample.questions) if questions else sample.captions)
    ]
    if len(usable) < count:
        raise ConfigError(f"--shots is {count}: {collection.name} has {len(usable)} images with such a text")
    shots = []
    for n in rng.permutation(len(usable))[:count]:
        sample = usable[int(n)]
        try:
            image = sample.read()
        except BadSampleError as error:
            raise DataError(f"{collection.name}: {sample.key}: {error.reason}: choose another --shots-seed") from error
        if questions:
            answered = [q for q in sample.questions if q.answers]
            question = answered[int(rng.integers(len(answered)))]
            # the answer that most people gave, the first of equals
            answer = max(question.answers, key=question.answers.count)
            shots.append(Shot(image, answer, question.text, sample.key))
        else:
            shots.append(Shot(image, sample.captions[int(rng.integers(len(sample.captions)))], None, sample.key))
    return shots
