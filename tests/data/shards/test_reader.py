"""Indexed shards against what webdataset writes and reads, and every way a shard can be broken."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from blip2.data.collection import BadSampleError, Collection, Question
from blip2.data.images import decode_image
from blip2.data.shards.reader import read_shards
from blip2.errors import DataError

Write = Callable[[Path, list[dict[str, Any]]], Path]


def reasons(collection: Collection) -> dict[str, str]:
    return {bad.key: bad.reason for bad in collection.bad}


def test_reads_what_webdataset_reads(shards: Path) -> None:
    paths = sorted(shards.glob("*.tar"))
    ours = read_shards("set", paths)
    theirs = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode())
    raw = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert len(ours.samples) == 13
    assert not ours.bad
    for sample, decoded, member in zip(ours.samples, theirs, raw, strict=True):
        assert sample.key == decoded["__key__"]
        assert sample.read() == member["jpg"]
        assert list(sample.captions) == decoded["json"]["captions"]
        assert sample.image_id == decoded["json"]["image_id"]


def test_grouping_follows_webdataset(tmp_path: Path, write_shard: Write, jpeg: Callable[..., bytes]) -> None:
    names = {"a/b.c/one.jpg": jpeg(1), "a/b.c/one.json": b'{"caption": "x"}', "two.small.jpg": b"?", "._one.jpg": b"?"}
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {**names, "README": b"no extension"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    collection = read_shards("set", [path])
    theirs = {sample["__key__"] for sample in webdataset.WebDataset([str(path)], shardshuffle=False)}
    assert theirs == {"a/b.c/one", "two"}
    assert [sample.key for sample in collection.samples] == ["a/b.c/one"]
    rule = "no image: the extension is .small.jpg, as WebDataset's keys end at a file name's first dot"
    assert reasons(collection) == {"two": rule}


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tiff", "jfif", "jpe", "PNG", "ppm"])
def test_every_image_that_can_be_decoded(tmp_path: Path, suffix: str) -> None:
    kind = {"jfif": "JPEG", "jpe": "JPEG"}.get(suffix, suffix)
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, kind)
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in {f"a.{suffix}": buffer.getvalue(), "a.txt": "eins\u2028zwei\r\ndrei".encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (sample,) = read_shards("set", [path]).samples
    assert decode_image(sample.read()).size == (9, 7)
    assert sample.captions == ("eins\u2028zwei", "drei")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["22.05.jpg"], "no image: the extension is .05.jpg, as WebDataset's keys end at a file name's first dot"),
        (["a.mp3", "a.txt"], "no image, but .mp3"),
        (["a.txt"], "no image"),
    ],
)
def test_what_a_key_has_in_place_of_an_image(tmp_path: Path, names: list[str], reason: str) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert list(reasons(read_shards("set", [path])).values()) == [reason]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"jpg": b""}, "zero-byte image"),
        ({"json": {"captions": []}}, "no caption"),
        ({"json": {"captions": [" "]}}, "no caption"),
        ({"json": {}}, "no caption"),
        ({"json": {"captions": [3]}}, "captions are not strings"),
        ({"json": {"captions": {"a": 1}}}, "captions are not strings"),
        ({"json": {"captions": ["a"], "answers": [1]}}, "answers are not strings"),
        ({"json": {"captions": ["a"], "question": 5}}, "question is not a string"),
        ({"json": b'{"captions": ["a"'}, "JSON is broken"),
        ({"json": b"[" * 100_000}, "JSON is broken"),
        ({"json": b"[1]"}, "JSON is not an object"),
        ({"json": b'{"captions": ["\xff\xfe"]}'}, "text is not UTF-8"),
        ({"json": rb'{"captions": ["\ud800"]}'}, "text is not UTF-8"),
        ({"json": None, "txt": b"caf\xe9"}, "text is not UTF-8"),
        ({"json": None, "txt": b""}, "no caption"),
        ({"json": None}, "no text"),
        ({"jpg": None}, "no image"),
    ],
)
def test_bad_samples_have_reasons(
    parts: dict[str, Any], reason: str, tmp_path: Path, write_shard: Write, jpeg: Callable[..., bytes]
) -> None:
    good = {"__key__": "good", "jpg": jpeg(), "json": {"captions": ["a"]}}
    bad = {name: value for name, value in {**good, "__key__": "bad", **parts}.items() if value is not None}
    collection = read_shards("set", [write_shard(tmp_path / "set.tar", [bad, good])])
    assert [sample.key for sample in collection.samples] == ["good"]
    assert reasons(collection) == {"bad": reason}


def test_txt_alone_questions_and_null_ids(tmp_path: Path, write_shard: Write, jpeg: Callable[..., bytes]) -> None:
    samples = [
        {"__key__": "txt", "webp": jpeg(kind="WEBP"), "txt": "\ufeffa cat\n\na dog\n"},
        {"__key__": "both", "png": jpeg(kind="PNG"), "txt": "a hat", "json": {"width": 3, "image_id": None}},
        {"__key__": "ask", "jpeg": jpeg(), "json": {"question": "what?", "answers": "this", "image_id": 7}},
    ]
    txt, both, ask = read_shards("set", [write_shard(tmp_path / "set.tar", samples)]).samples
    assert txt.captions == ("a cat", "a dog")
    assert (both.captions, both.image_id) == (("a hat",), "both")
    assert (ask.captions, ask.questions, ask.image_id) == ((), (Question("what?", ("this",)),), "7")


@pytest.mark.parametrize("where", ["image", "header", "boundary", "text", "end"])
def test_truncated_shard_keeps_whole_samples(
    where: str, tmp_path: Path, write_shard: Write, jpeg: Callable[..., bytes]
) -> None:
    samples = [{"__key__": f"k{n}", "jpg": jpeg(n), "json": {"captions": ["a"]}} for n in range(3)]
    path = write_shard(tmp_path / "set.tar", samples)
    with tarfile.open(path) as tar:
        third_image, third_text = tar.getmember("k2.jpg"), tar.getmember("k2.json")
    cut = {
        "image": third_image.offset_data + 100,
        "header": third_image.offset + 100,
        "boundary": third_image.offset,
        "text": third_text.offset_data + 3,
        "end": third_text.offset_data + 512,
    }[where]
    with path.open("r+b") as handle:
        handle.truncate(cut)
    collection = read_shards("set", [path])
    whole = 3 if where == "end" else 2
    assert [sample.key for sample in collection.samples] == ["k0", "k1", "k2"][:whole]
    assert all(sample.read() == jpeg(n) for n, sample in enumerate(collection.samples))
    assert "shard is truncated here" in reasons(collection).values()


def test_broken_header_is_reported(shards: Path) -> None:
    path = shards / "part-00000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmember("key003.jpg").offset
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(b"garbage" * 73)
    collection = read_shards("set", [path])
    assert [sample.key for sample in collection.samples] == ["key000", "key001", "key002"]
    assert reasons(collection) == {"after key002.json": "shard is truncated here"}


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, None])
def test_file_that_is_no_shard(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="set.tar: ") as error:
        read_shards("set", [path])
    assert "\n" not in str(error.value)


def test_vanished_shard_is_an_error_and_a_short_one_a_bad_sample(shards: Path) -> None:
    path = shards / "part-00000.tar"
    sample = read_shards("set", [path]).samples[-1]
    with path.open("r+b") as handle:
        handle.truncate(sample.offset + 10)
    with pytest.raises(BadSampleError, match="image is truncated"):
        sample.read()
    path.unlink()
    with pytest.raises(DataError, match="part-00000.tar: shard cannot be read"):
        sample.read()


def test_name_that_is_not_utf8(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for extension, data in {"jpg": jpeg(), "txt": b"a cat"}.items():
            member = tarfile.TarInfo(f"caf\udce9.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    collection = read_shards("set", [path])
    assert [sample.key for sample in collection.samples] == ["caf\ufffd"]
    assert collection.fingerprint()


def test_fingerprint_of_a_copy_is_the_same_and_of_a_changed_image_is_not(shards: Path, tmp_path: Path) -> None:
    path = sorted(shards.glob("*.tar"))[0]
    copy = tmp_path / "copy.tar"
    copy.write_bytes(path.read_bytes())
    first, second = read_shards("set", [path]), read_shards("set", [copy])
    assert first.fingerprint() == second.fingerprint()
    last = second.samples[-1]
    with copy.open("rb+") as handle:
        handle.seek(last.offset + last.size - 20)
        handle.write(b"x")
    assert first.fingerprint() != second.fingerprint()
    copy.unlink()
    assert first.fingerprint() != second.fingerprint()


def test_fingerprint_follows_files_keys_and_order(shards: Path) -> None:
    paths = sorted(shards.glob("*.tar"))
    first = read_shards("set", paths)
    assert first.fingerprint() == read_shards("other name", paths).fingerprint()
    assert first.fingerprint() != read_shards("set", paths[::-1]).fingerprint()
    assert first.fingerprint() != first.limited(5).fingerprint()
    assert first.fingerprint() != read_shards("set", paths[:1]).fingerprint()
    assert len(first.limited(5).samples) == 5
    assert first.limited(None).samples == first.samples
