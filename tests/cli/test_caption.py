"""`blip2 caption` around the model: which images, what is skipped, what is written."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from blip2.cli import caption
from blip2.data import image_files
from blip2.data.folders import read_folder
from blip2.errors import DataError
from blip2.inference import loading
from blip2.weights import runs


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deeper/c.webp"):
        picture = Image.new("RGB", (8, 8), "red")
        picture.save(folder / name, {"a.JPG": "JPEG"}.get(name))
    (folder / "notes.txt").write_text("not a picture")
    return folder


def find_images(names: list[str]) -> list[str]:
    return [str(path) for path in image_files.find_images(names).paths]


def options(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"sidecar": False, "out": None, "json": False, **values})


def test_images_are_found_once_and_in_order(photos: Path) -> None:
    images = find_images([str(photos), str(photos / "b.png")])
    assert [Path(p).relative_to(photos).as_posix() for p in images] == ["a.JPG", "b.png", "deeper/c.webp"]
    assert find_images([str(photos / "b.png"), str(photos)])[0].endswith("b.png")


def test_what_is_not_there(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.jpg: no such file or folder"):
        find_images([str(tmp_path / "gone.jpg")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image in this folder"):
        find_images([str(tmp_path / "empty")])


def test_what_is_in_the_file_is_not_done_again(photos: Path, tmp_path: Path) -> None:
    paths = find_images([str(photos)])
    out = tmp_path / "sub" / "captions.jsonl"
    assert caption.not_done(paths, options(out=str(out))) == paths
    caption.write_captions(paths[0], ["ein Hund — groß"], options(out=str(out)))
    with out.open("a") as handle:
        handle.write('{"image": "' + paths[1])  # killed here
    assert caption.not_done(paths, options(out=str(out))) == paths[1:]
    caption.write_captions(paths[1], ["two"], options(out=str(out)))
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert lines == [
        {"image": paths[0], "captions": ["ein Hund — groß"]},
        {"image": paths[1], "captions": ["two"]},
    ]


def test_another_file_is_not_written_to(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "other.jsonl"
    out.write_text('{"something": "else"}\n')
    with pytest.raises(DataError, match="other.jsonl: line 1 is not a caption line; choose another --out"):
        caption.not_done(find_images([str(photos)]), options(out=str(out)))
    assert out.read_text() == '{"something": "else"}\n'


def test_sidecars(photos: Path) -> None:
    paths = find_images([str(photos)])
    (photos / "b.txt").write_text("mine")
    todo = caption.not_done(paths, options(sidecar=True))
    assert [Path(p).name for p in todo] == ["a.JPG", "c.webp"]
    caption.write_captions(todo[0], ["one", "two"], options(sidecar=True))
    assert (photos / "a.txt").read_text() == "one\ntwo\n"
    assert (photos / "b.txt").read_text() == "mine"
    assert not list(photos.glob(".*.tmp*"))


def test_two_images_of_one_stem_have_a_sidecar_each(photos: Path) -> None:
    (photos / "a.png").write_bytes((photos / "b.png").read_bytes())
    (photos / "a.txt").write_text("of either")
    paths = [path for path in find_images([str(photos)]) if Path(path).stem == "a"]
    assert caption.not_done(paths, options(sidecar=True)) == paths
    for path in paths:
        caption.write_captions(path, [path], options(sidecar=True))
    assert caption.not_done(paths, options(sidecar=True)) == []
    collection = read_folder(photos)
    assert [(s.key, s.captions) for s in collection.samples] == [("a.JPG", (paths[0],)), ("a.png", (paths[1],))]
    assert len({sample.image_id for sample in collection.samples}) == 2


@pytest.mark.parametrize("text", ["", " \n\t\r\n"])
def test_a_blank_sidecar_is_none(photos: Path, text: str) -> None:
    (photos / "b.txt").write_text(text)
    assert str(photos / "b.png") in caption.not_done(find_images([str(photos)]), options(sidecar=True))


def test_an_image_with_a_name_as_long_as_can_be(photos: Path) -> None:
    path = photos / ("n" * 251 + ".png")
    path.write_bytes((photos / "b.png").read_bytes())
    caption.write_captions(str(path), ["a dog"], options(sidecar=True))
    assert path.with_suffix(".txt").read_text() == "a dog\n"


def test_lines_for_people_and_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    caption.write_captions("x.jpg", ["a dog", "a cat"], options())
    assert capsys.readouterr().out == "x.jpg: a dog\nx.jpg: a cat\n"
    caption.write_captions("x.jpg", ["a dog"], options(json=True))
    assert json.loads(capsys.readouterr().out) == {"image": "x.jpg", "captions": ["a dog"]}


def test_batches_leave_out_what_cannot_be_read(photos: Path) -> None:
    (photos / "bad.png").write_bytes(b"no picture")
    failed: list[str] = []
    batches = list(caption.batches(find_images([str(photos)]), 2, 4, failed))
    assert [[Path(name).name for name in names] for names, _ in batches] == [["a.JPG", "b.png"], ["c.webp"]]
    assert len(failed) == 1
    assert failed[0].startswith(str(photos / "bad.png"))


def test_default_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BLIP2_MODEL", raising=False)
    assert loading.default_run() == "tiny"
    from blip2.configs import RunConfig

    for number, (name, stage) in enumerate((("old", "stage2"), ("new", "stage2"), ("first", "stage1"))):
        step = tmp_path / "runs" / name / "checkpoints" / "step-000001"
        step.mkdir(parents=True)
        runs.write_config(tmp_path / "runs" / name, RunConfig(stage=stage))
        (step / runs.WEIGHTS).write_bytes(b"")
        os.utime(step, (1000 + number, 1000 + number))
    assert loading.default_run() == str(Path("runs") / "new")
    monkeypatch.setenv("BLIP2_MODEL", "elsewhere")
    assert loading.default_run() == "elsewhere"
