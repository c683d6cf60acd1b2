"""VQAv2, OK-VQA and GQA: questions and answers by image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2.data.convert.locate import Images, annotation, expecting, images_of, load_json
from blip2.data.convert.records import Item, Request, Unit, cut, grouped
from blip2.errors import DataError


def read_vqa(request: Request) -> list[Unit]:
    """VQAv2 and OK-VQA: `*questions.json`, with `*annotations.json` beside unless the split is a test one."""
    split = request.split or "val"
    path = annotation(request, f"*_{split}20*_questions.json", f"*{split}*_questions.json")
    asked = load_json(path)
    answers = _answers(path, split)
    images = images_of(request, path)
    with expecting(path, "a VQA questions file"):
        items = list(_vqa_items(asked, answers, images))
    missing = len(answers) and sum(not item.entry["qa"][0]["answers"] for item in items)
    if missing:
        raise DataError(f"{path}: {missing} of its questions have no answer in the annotations beside it")
    return cut(grouped(items), request.size)


def read_gqa(request: Request) -> list[Unit]:
    """GQA: `SPLIT_balanced_questions.json`, or a folder of `*.json` as the full training set comes in."""
    split = request.split or "testdev_balanced"
    if request.source.is_dir() and (request.source / f"{split}_questions").is_dir():
        paths = sorted((request.source / f"{split}_questions").glob("*.json"))
    else:
        paths = [annotation(request, f"{split}_questions.json", f"{split}*_questions.json")]
    images = Images(request.images or request.source) if request.source.is_dir() else images_of(request, paths[0])
    items: list[Item] = []
    for path in paths:
        data = load_json(path)
        with expecting(path, "a GQA questions file"):
            items += _gqa_items(data, images)
    return cut(grouped(items), request.size)


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


def _vqa_items(data: Any, answers: dict[Any, dict[str, Any]], images: Images) -> Iterator[Item]:
    part = data.get("data_subtype", "")
    for row in data["questions"]:
        told = answers.get(row["question_id"], {})
        asked = {
            "question": row["question"],
            "question_id": row["question_id"],
            "answers": [answer["answer"] for answer in told.get("answers", ())],
        }
        if "answer_type" in told:
            asked["answer_type"] = told["answer_type"]
        number = int(row["image_id"])
        name = images.find(f"COCO_{part}_{number:012d}.jpg")
        if not Path(name).is_file():  # the 2017 names
            plain = images.find(f"{number:012d}.jpg")
            name = plain if Path(plain).is_file() else name
        yield Item(Path(name).stem, {"image_id": str(number), "captions": [], "qa": [asked]}, name)


def _gqa_items(data: Any, images: Images) -> Iterator[Item]:
    for number, row in data.items():
        asked = {"question": row["question"], "question_id": number, "answers": []}
        if "answer" in row:
            asked["answers"] = [row["answer"]]
        kind = row.get("types", {}).get("structural")
        if kind:
            asked["answer_type"] = kind
        image = str(row["imageId"])
        yield Item(f"gqa-{image}", {"image_id": image, "captions": [], "qa": [asked]}, images.find(f"{image}.jpg"))
