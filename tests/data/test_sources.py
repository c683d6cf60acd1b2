"""Names, patterns and paths of data sets, and what is said where they are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blip2.data.images import decode_image
from blip2.data.sources import open_collection
from blip2.errors import DataError


def test_paths_globs_braces_and_folders(shards: Path) -> None:
    for spec, count in (
        (shards, 13),
        (shards / "part-00001.tar", 6),
        (shards / "part-*.tar", 13),
        (shards / "part-{00000..00001}.tar", 13),
        (shards / "part-{00001,00000}.tar", 13),
    ):
        assert len(open_collection(str(spec)).samples) == count
    assert open_collection(str(shards / "part-{00001,00000}.tar")).samples[0].key == "key007"


@pytest.mark.parametrize("folder", ["[set 1]", "a[0-9]b", "{a,b}", "what?", "star*", "[set 1]/{0..1}"])
def test_what_exists_is_itself_before_it_is_a_pattern(
    folder: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shards, tmp_path / folder)
    (tmp_path / folder / "part-00001.tar").rename(tmp_path / folder / "[1] {1,2}*.tar")
    monkeypatch.chdir(tmp_path)
    for spec, count in (
        (folder, 13),
        (f"{folder}/part-00000.tar", 7),
        (f"{folder}/*.tar", 13),
        (f"{folder}/part-{{00000..00000}}.tar", 7),
        (f"{folder}/[1] {{1,2}}*.tar", 6),
        (f"{tmp_path}/{folder}/[1] {{1,2}}*.tar", 6),
    ):
        assert len(open_collection(spec).samples) == count


@pytest.mark.parametrize(
    ("spec", "folder"), [("flickr8k:dev", "flickr8k"), ("coco:dev", "photos/coco"), ("daquar:test", "photos/daquar")]
)
def test_named_set_in_blip2_data(
    spec: str, folder: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "data" / folder
    shutil.copytree(shards, place)
    (place / "part-00000.tar").rename(place / f"{spec.partition(':')[2]}-00000.tar")
    monkeypatch.setenv("BLIP2_DATA", str(tmp_path / "data"))
    collection = open_collection(spec)
    assert collection.name == spec
    assert [Path(sample.path).parent for sample in collection.samples] == [place] * 7


def test_objects_keeps_the_last_of_each_four_back(
    jpeg: Callable[..., bytes], write_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos" / "objects"
    folder.mkdir(parents=True)
    rows = [
        {"__key__": f"t{n // 4}_{n % 4}", "jpg": jpeg(n), "json": {"captions": [f"a thing {n // 4}"]}}
        for n in range(12)
    ]
    write_shard(folder / "train-00000.tar", rows)
    monkeypatch.setenv("BLIP2_DATA", str(tmp_path))
    train, dev = open_collection("objects:train"), open_collection("objects:dev")
    assert [sample.key for sample in dev.samples] == ["t0_3", "t1_3", "t2_3"]
    assert len(train.samples) == 9
    assert not {s.key for s in train.samples} & {s.key for s in dev.samples}


def test_named_set_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_DATA", str(tmp_path / "here"))
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "there"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("blip2.data.sources.__file__", str(tmp_path / "a/b/c/d/sources.py"))
    with pytest.raises(DataError) as error:
        open_collection("flickr8k:train")
    message = str(error.value)
    for part in ("flickr8k:train", "here/flickr8k", "there/flickr8k", "shared/flickr8k", "BLIP2_DATA"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flickr9k:train", "flickr9k:train: no such file or folder, and not a named set"),
        ("flickr8k:test", "flickr8k:test: no such file or folder, and not a named set"),
        ("gone-*.tar", "gone-\\*.tar: no such shard"),
        ("gone-{0..1}.tar", "gone-0.tar: no such shard"),
        ("open-{0.tar", "not a brace pattern|no such shard"),
        ("gone.jsonl", "gone.jsonl: cannot be read"),
        ("empty", "empty: nothing in it: expected .tar shards, or images"),
        ("silent", "silent: every sample is bad, the first: a: no text"),
        ("notes.txt", "notes.txt: not a data set"),
    ],
)
def test_wrong_specs(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jpeg: Callable[..., bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=message) as error:
        open_collection(spec)
    assert "\n" not in str(error.value)


def test_jsonl_and_image_folder(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "set.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "a dog"}))
    assert open_collection(str(tmp_path)).samples[0].captions == ("a cat",)
    assert open_collection(str(tmp_path / "set.jsonl")).samples[0].captions == ("a dog",)


def test_skimage_photographs_are_in_colour() -> None:
    pytest.importorskip("skimage")
    collection = open_collection("skimage")
    assert {"astronaut", "chelsea", "coffee"} <= {sample.key for sample in collection.samples}
    for sample in collection.samples:
        image = decode_image(sample.read())
        red, green, blue = image.resize((8, 8)).split()
        assert min(image.size) >= 200
        assert red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes()


def test_flickr8k(flickr8k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_DATA", str(flickr8k.parent))
    dev = open_collection("flickr8k:dev")
    assert len(dev.samples) == 1000
    assert not dev.bad
    assert len({sample.image_id for sample in dev.samples}) == 1000


def test_easy_vqa_dev_is_held_out_of_train() -> None:
    pytest.importorskip("easy_vqa")
    train, dev, test = (open_collection(f"easy-vqa:{split}") for split in ("train", "dev", "test"))
    keys = [{sample.key for sample in part.samples} for part in (train, dev, test)]
    assert [len(part) for part in keys] == [3600, 400, 1000]
    assert not keys[0] & keys[1]
