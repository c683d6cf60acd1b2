"""VQAv2, OK-VQA and GQA from miniature originals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip2.data.sources import open_collection
from blip2.errors import DataError

ASKED = [
    {"image_id": 42, "question": "What is it?", "question_id": 420},
    {"image_id": 42, "question": "How many?", "question_id": 421},
    {"image_id": 73, "question": "Is it red?", "question_id": 730},
]


def answered(words: dict[int, str]) -> dict[str, Any]:
    rows = [
        {
            "question_id": number,
            "answer_type": "other",
            "multiple_choice_answer": word,
            "answers": [{"answer": word, "answer_confidence": "yes", "answer_id": k} for k in range(10)],
        }
        for number, word in words.items()
    ]
    return {"annotations": rows}


@pytest.mark.parametrize(("kind", "prefix"), [("vqav2", "v2_"), ("okvqa", "")])
def test_vqa(kind: str, prefix: str, tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    questions = {"questions": ASKED, "data_subtype": "val2014"}
    (tmp_path / f"{prefix}OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    annotations = tmp_path / f"{prefix}mscoco_val2014_annotations.json"
    annotations.write_text(json.dumps(answered({420: "dog", 421: "2", 730: "no"})))
    draw_image(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg", 42)
    draw_image(tmp_path / "val2017" / "000000000073.jpg", 73)
    manifest, samples = converted(kind, tmp_path, split="val")
    assert list(samples) == ["COCO_val2014_000000000042", "000000000073"]
    assert samples["000000000073"]["qa"] == [
        {"question": "Is it red?", "question_id": 730, "answers": ["no"] * 10, "answer_type": "other"}
    ]
    assert manifest["questions"] == 3
    first = open_collection(str(tmp_path / "out")).samples[0]
    assert [(q.text, q.answers[0], q.kind) for q in first.questions] == [
        ("What is it?", "dog", "other"),
        ("How many?", "2", "other"),
    ]
    annotations.write_text(json.dumps(answered({420: "dog"})))
    with pytest.raises(DataError, match="2 of its questions have no answer"):
        converted(kind, tmp_path, split="val")
    annotations.unlink()
    with pytest.raises(DataError, match=r"annotations.json: no such annotation file: it must lie beside"):
        converted(kind, tmp_path, split="val")


def test_vqa_test_split_has_no_answers(tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    for name in ("test2015", "test-dev2015"):
        questions = {"questions": ASKED[:1] if "dev" in name else ASKED[:2], "data_subtype": "test2015"}
        (tmp_path / f"v2_OpenEnded_mscoco_{name}_questions.json").write_text(json.dumps(questions))
    draw_image(tmp_path / "test2015" / "COCO_test2015_000000000042.jpg", 42)
    assert converted("vqav2", tmp_path, tmp_path / "a", split="test")[0]["questions"] == 2
    assert converted("vqav2", tmp_path, tmp_path / "b", split="test-dev")[0]["questions"] == 1


def test_gqa(tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    rows = {
        "01": {"imageId": "n5", "question": "Is it?", "answer": "yes", "types": {"structural": "verify"}},
        "02": {"imageId": "n5", "question": "What?", "answer": "cup", "types": {"structural": "query"}},
    }
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    draw_image(tmp_path / "images" / "n5.jpg", 5)
    _, samples = converted("gqa", tmp_path)
    assert [(q["question_id"], q["answers"], q["answer_type"]) for q in samples["gqa-n5"]["qa"]] == [
        ("01", ["yes"], "verify"),
        ("02", ["cup"], "query"),
    ]
    folder = tmp_path / "train_all_questions"
    folder.mkdir()
    for number, (name, row) in enumerate(rows.items()):
        (folder / f"train_all_questions_{number}.json").write_text(json.dumps({name: row}))
    _, samples = converted("gqa", tmp_path, tmp_path / "all", split="train_all")
    assert len(samples["gqa-n5"]["qa"]) == 2
    (tmp_path / "testdev_balanced_questions.json").write_text("[1]")
    with pytest.raises(DataError, match="not a GQA questions file"):
        converted("gqa", tmp_path)
