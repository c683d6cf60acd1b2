"""VQAv2, OK-VQA and GQA: questions and answers by image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2.data.collection import RawSample
from blip2.data.convert.locate import Images, annotation, expecting, images_of, load_json
from blip2.data.convert.records import Request, Unit, merge_by_image, split_into_units
from blip2.errors import DataError


def read_vqa(request: Request) -> list[Unit]:
    """VQAv2 and OK-VQA: `*questions.json`, with `*annotations.json` beside unless the split is a test one."""
    split = request.split or "val"
    path = annotation(request, f"*_{split}20*_questions.json", f"*{split}*_questions.json")
    questions = load_json(path)
    answers = _answers(path, split)
    images = images_of(request)
    with expecting(path, "a VQA questions file"):
        samples = list(_vqa_samples(questions, answers, images))
    missing = len(answers) and sum(not sample.entry["qa"][0]["answers"] for sample in samples)
    if missing:
        raise DataError(f"{path}: {missing} of its questions have no answer in the annotations beside it")
    return split_into_units(merge_by_image(samples), request.size)


def read_gqa(request: Request) -> list[Unit]:
    """GQA: `SPLIT_balanced_questions.json`, or a folder of `*.json` as the full training set comes in."""
    split = request.split or "testdev_balanced"
    if request.source.is_dir() and (request.source / f"{split}_questions").is_dir():
        paths = sorted((request.source / f"{split}_questions").glob("*.json"))
    else:
        paths = [annotation(request, f"{split}_questions.json", f"{split}*_questions.json")]
    images = images_of(request)
    samples: list[RawSample] = []
    for path in paths:
        data = load_json(path)
        with expecting(path, "a GQA questions file"):
            samples += _gqa_samples(data, images)
    return split_into_units(merge_by_image(samples), request.size)


def _answers(questions: Path, split: str) -> dict[Any, dict[str, Any]]:
    """Annotations by question id; empty for a test split, whose answers are kept by its authors."""
    name = questions.name.replace("_questions", "_annotations").replace("OpenEnded_", "")
    path = questions.with_name(name)
    if not path.is_file():
        if split.startswith("test"):
            return {}
        raise DataError(f"{path}: no such annotation file: it must lie beside {questions.name}")
    data = load_json(path)
    with expecting(path, "a VQA annotations file"):
        return {row["question_id"]: row for row in data["annotations"]}


def _vqa_samples(data: Any, answers: dict[Any, dict[str, Any]], images: Images) -> Iterator[RawSample]:
    part = data.get("data_subtype", "")
    for row in data["questions"]:
        labels = answers.get(row["question_id"], {})
        question = {
            "question": row["question"],
            "question_id": row["question_id"],
            "answers": [answer["answer"] for answer in labels.get("answers", ())],
        }
        if "answer_type" in labels:
            question["answer_type"] = labels["answer_type"]
        number = int(row["image_id"])
        name = images.find(f"COCO_{part}_{number:012d}.jpg")
        if not Path(name).is_file():  # the 2017 names
            name_2017 = images.find(f"{number:012d}.jpg")
            name = name_2017 if Path(name_2017).is_file() else name
        yield RawSample(Path(name).stem, {"image_id": str(number), "captions": [], "qa": [question]}, name)


def _gqa_samples(data: Any, images: Images) -> Iterator[RawSample]:
    for number, row in data.items():
        question = {"question": row["question"], "question_id": number, "answers": []}
        if "answer" in row:
            question["answers"] = [row["answer"]]
        kind = row.get("types", {}).get("structural")
        if kind:
            question["answer_type"] = kind
        image = str(row["imageId"])
        yield RawSample(
            f"gqa-{image}", {"image_id": image, "captions": [], "qa": [question]}, images.find(f"{image}.jpg")
        )
