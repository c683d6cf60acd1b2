"""Examples of files and of data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blip2.data.collection import Collection, Question, Sample
from blip2.data.few_shot import Shot, draw_shots, read_shots
from blip2.errors import ConfigError, DataError


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    lines = [{"image": "a.png", "caption": " a dog "}, {"image": "/b.png", "question": "What?", "answer": "a cat"}]
    file.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    first, second = read_shots(file)
    assert first == Shot(tmp_path / "a.png", "a dog", None, "a.png")
    assert second == Shot(Path("/b.png"), "a cat", "What?", "/b.png")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: JSON is broken"),
        ("[]", "line 1: JSON is not an object"),
        ('{"caption": "a"}', 'line 1: no "image"'),
        ('{"image": "a"}', 'line 1: "caption" is not a text'),
        ('{"image": "a", "question": "b"}', 'line 1: "answer" is not a text'),
        ('{"image": "a", "question": 3, "answer": "b"}', 'line 1: "question" is not a text'),
        ("", "no examples in it"),
    ],
)
def test_bad_files(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=f"{file}: {message}"):
        read_shots(file)
    with pytest.raises(DataError, match="none.jsonl: cannot be read: No such file"):
        read_shots(tmp_path / "none.jsonl")


def collection(folder: Path, jpeg: Callable[..., bytes]) -> Collection:
    samples = []
    for n in range(5):
        (folder / f"{n}.jpg").write_bytes(jpeg(n))
        questions = (Question("How many?", ("two", "three", "three")),) if n else ()
        samples.append(Sample(f"k{n}", f"k{n}", (f"caption {n}",), str(folder / f"{n}.jpg"), questions=questions))
    return Collection("set", samples)


def test_draw(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    data = collection(tmp_path, jpeg)
    drawn = draw_shots(data, 4, 1, questions=False)
    assert drawn == draw_shots(data, 4, 1, questions=False)
    assert [s.key for s in drawn] != [s.key for s in draw_shots(data, 4, 2, questions=False)]
    assert len({s.key for s in drawn}) == 4
    assert all(s.text == f"caption {s.key[1:]}" and s.question is None for s in drawn)
    assert drawn[0].image == data.samples[int(drawn[0].key[1:])].read()
    assert {(s.text, s.question) for s in draw_shots(data, 4, 0, questions=True)} == {("three", "How many?")}
    with pytest.raises(ConfigError, match="--shots is 5: set has 4 images with such a text"):
        draw_shots(data, 5, 0, questions=True)
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(DataError, match="set: k2: image file cannot be read: choose another --shots-seed"):
        draw_shots(data, 5, 0, questions=False)
