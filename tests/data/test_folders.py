"""Folders with sidecar texts and JSONL files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blip2.data.collection import BadSampleError, Question
from blip2.data.folders import read_folder, read_jsonl
from blip2.errors import DataError

Jpeg = Callable[..., bytes]


def test_folder(tmp_path: Path, jpeg: Jpeg) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.jpg", "deep/er/b.JPG", "untold.png", "latin.jpg", "silent.jpg", "odd.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "a.txt").write_text("a cat\n  \na dog  \n")
    (tmp_path / "deep/er/b.txt").write_text("a bird")
    (tmp_path / "zero.txt").write_text("nothing")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "silent.txt").write_text("\n")
    (tmp_path / "odd.txt").mkdir()
    collection = read_folder(tmp_path)
    assert {sample.key: sample.captions for sample in collection.samples} == {
        "a": ("a cat", "a dog"),
        "deep/er/b": ("a bird",),
    }
    assert collection.samples[0].read() == jpeg()
    assert {bad.key: bad.reason for bad in collection.bad} == {
        "untold": "no text",
        "zero": "zero-byte image",
        "latin": "text is not UTF-8",
        "silent": "no caption",
        "odd": "text cannot be read",
    }


def test_image_that_vanishes_is_one_bad_sample(tmp_path: Path, jpeg: Jpeg) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.txt").write_text("a cat")
    sample = read_folder(tmp_path).samples[0]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(BadSampleError, match="image file cannot be read"):
        sample.read()


def test_file_name_that_is_not_utf8(tmp_path: Path, jpeg: Jpeg) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        Path(os.fsdecode(name + b".jpg")).write_bytes(jpeg())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    Path(os.fsdecode(name + b".txt")).write_text("a cup")
    collection = read_folder(tmp_path)
    assert [sample.key for sample in collection.samples] == ["caf\ufffd"]
    assert collection.samples[0].read() == jpeg()
    assert collection.fingerprint()


def test_jsonl(tmp_path: Path, jpeg: Jpeg) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "zero.jpg").touch()
    lines = [
        json.dumps({"image": "images/a.jpg", "captions": ["a cat", "a pet"], "image_id": 3}),
        json.dumps({"image": "images/a.jpg", "caption": "a dog"}),
        "",
        json.dumps({"image": "images/a.jpg", "question": "what?", "answers": ["this", "that"], "image_id": None}),
        json.dumps({"image": "gone.jpg", "caption": "a"}),
        json.dumps({"image": "zero.jpg", "caption": "a"}),
        json.dumps({"image": "images/a.jpg"}),
        json.dumps({"caption": "a"}),
        json.dumps({"image": "a\0b.jpg", "caption": "a"}),
        "{broken",
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    collection = read_jsonl(tmp_path / "set.jsonl")
    first, second, third = collection.samples
    assert (first.image_id, first.captions, first.read()) == ("3", ("a cat", "a pet"), jpeg())
    assert (third.questions, third.captions) == ((Question("what?", ("this", "that")),), ())
    assert second.image_id == third.image_id  # the same file is the same image
    assert [bad.reason for bad in collection.bad] == [
        "no image",
        "zero-byte image",
        "no caption",
        "no image",
        "image file cannot be read",
        "JSON is broken",
    ]
    assert collection.bad[-1].key == "line 10"


def test_jsonl_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="set.jsonl: cannot be read"):
        read_jsonl(tmp_path / "set.jsonl")
