"""Samples of several images and films in a JSONL file, drawn as training and dev batches."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.data.test_film import write_gif

from blip2.data.check import check_collection
from blip2.data.images import ImageSpec
from blip2.data.loader import TrainingBatches, dev_batches, require_single_images
from blip2.data.sources import open_collection
from blip2.errors import DataError

SPEC = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), frames=4)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    for n, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{n}.png")
    write_gif(tmp_path / "film.gif", 8)
    lines = [
        {"image": "0.png", "captions": "one"},
        {"images": ["0.png", "1.png", "2.png"], "captions": "three"},
        {"video": "film.gif", "question": "what?", "answer": "it", "captions": "film"},
        {"image": "film.gif", "captions": "the first frame"},
        {"images": ["0.png", "nowhere.png"], "captions": "bad"},
        {"images": [], "captions": "bad"},
        {"video": 7, "captions": "bad"},
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "set.jsonl"


def test_what_a_line_may_name(jsonl: Path) -> None:
    collection = open_collection(str(jsonl))
    assert [(len(s.more) + 1, s.film, s.captions[0]) for s in collection.samples] == [
        (1, False, "one"),
        (3, False, "three"),
        (1, True, "film"),
        (1, False, "the first frame"),
    ]
    assert [bad.reason for bad in collection.bad] == ["no image", "images is not a list of files", "no image"]
    with pytest.raises(DataError, match="2-0 has several images or a film: they are for stage 2"):
        require_single_images(collection)


def test_dev_batches(jsonl: Path) -> None:
    [batch] = dev_batches(open_collection(str(jsonl)), batch=8, spec=SPEC)
    assert (batch.captions, batch.images) == (["one", "three", "film", "the first frame"], [1, 3, 4, 1])
    assert batch.pixels is not None
    assert batch.pixels.shape == (9, 3, 32, 32)
    means = [round(float(view.mean() * 127.5 + 127.5)) for view in batch.pixels]
    assert means == [85, 85, 43, 85, 0, 20, 40, 60, 0]
    groups = list(batch.groups(batch.pixels))
    assert [(rows, tuple(part.shape[:2])) for rows, part in groups] == [([0, 3], (2, 3)), ([1], (1, 3)), ([2], (1, 4))]


@pytest.mark.parametrize("augment", [False, True])
def test_training_batches_are_the_same_for_the_same_step(jsonl: Path, augment: bool) -> None:
    def batches() -> TrainingBatches:
        return TrainingBatches(open_collection(str(jsonl)), batch=4, seed=1, spec=SPEC, augment=augment)

    first, again = batches().load(2), batches().load(2)
    assert sorted(first.images or []) == [1, 1, 3, 4]
    assert first.pixels is not None
    assert again.pixels is not None
    assert torch.equal(first.pixels, again.pixels)


def test_one_crop_for_all_frames(tmp_path: Path) -> None:
    """What moves between frames is the film, not the camera."""
    picture = Image.effect_noise((60, 60), 80).convert("RGB")
    picture.save(tmp_path / "a.png")
    line = {"images": ["a.png"] * 3, "captions": "same"}
    (tmp_path / "set.jsonl").write_text(json.dumps(line))
    made = TrainingBatches(open_collection(str(tmp_path / "set.jsonl")), batch=1, seed=1, spec=SPEC, augment=True)
    views = [made.load(step).pixels for step in (0, 1)]
    for view in views:
        assert view is not None
        assert torch.equal(view[0], view[1])
        assert torch.equal(view[0], view[2])
    assert not torch.equal(views[0], views[1])  # type: ignore[arg-type]


def test_shards_of_several_images_and_films(jsonl: Path, tmp_path: Path) -> None:
    """WebDataset's keys: `KEY.0.jpg`, `KEY.1.jpg`, ... belong together, `KEY.mp4` is a film; one image stays one."""
    png, film = (jsonl.parent / "0.png").read_bytes(), b"\0\0\0\x18ftypisom" + bytes(50)
    members = {"a.0.png": png, "a.1.png": png, "a.2.png": png, "b.mp4": film, "c.png": png, "c.1.png": png}
    members |= {"d.1.png": png, "e.0.png": png, "e.1.png": b"", "f.png": png, "f.mp4": film}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key in "abcdef":
            own = {name: data for name, data in members.items() if name.startswith(key)} | {f"{key}.txt": b"a text"}
            for name, data in own.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    collection = open_collection(str(tmp_path / "x.tar"))
    assert {s.key: (1 + len(s.more), s.film) for s in collection.samples} == {
        "a": (3, False),
        "b": (1, True),
        "c": (1, False),
        "f": (1, False),
    }
    assert {bad.key: bad.reason.split(":")[0] for bad in collection.bad} == {"d": "no image", "e": "zero-byte image"}
    assert collection.samples[0].read_all() == [png] * 3


def test_the_check_decodes_all_of_them(jsonl: Path, tmp_path: Path) -> None:
    (jsonl.parent / "2.png").write_bytes(b"no image")
    report = check_collection(str(jsonl), progress=False)
    assert report.samples == 3
    assert report.by_reason()["not an image"] == 1
