"""What img2dataset writes, lists of addresses, tables, JSON lines and folders."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip2.errors import ConfigError, DataError


@pytest.fixture
def img2dataset(tmp_path: Path, draw_image: Callable[..., Path], write_shard: Callable[..., Path]) -> Path:
    """Two shards as img2dataset writes them, one sample of them broken."""
    folder = tmp_path / "laion"
    folder.mkdir()
    for shard in range(2):
        rows = []
        for n in range(3):
            number = 3 * shard + n
            entry = {"caption": f"text {number}", "url": f"http://x/{number}.jpg", "key": "k", "status": "success"}
            entry |= {"similarity": 0.3, "exif": "{}", "error_message": None}
            data = draw_image(tmp_path / f"{number}.jpg", number).read_bytes() if number != 4 else b"\xff\xd8\xffcut"
            rows.append({"__key__": f"{shard:05d}{n:04d}", "jpg": data, "txt": f"text {number}", "json": entry})
        write_shard(folder / f"{shard:05d}.tar", rows)
    return folder


def test_img2dataset_shards_one_to_one(img2dataset: Path, converted: Any, tmp_path: Path) -> None:
    manifest, samples = converted("laion", img2dataset)
    assert [shard["samples"] for shard in manifest["shards"]] == [3, 2]
    assert samples["000010002"] == {
        "image_id": "000010002",
        "captions": ["text 5"],
        "url": "http://x/5.jpg",
        "similarity": 0.3,
        "member": "000010002.jpg",
    }
    (reason,) = manifest["bad"]
    assert "image" in reason
    assert (tmp_path / "out" / "laion-00001.tar").is_file()


@pytest.mark.parametrize("kind", ["cc3m", "cc12m", "sbu"])
def test_lists_of_addresses(kind: str, tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    urls = [f"http://a.org/p/{n}_x.jpg?big=1" for n in range(4)]
    texts = [f"caption {n}" for n in range(4)]
    draw_image(tmp_path / "images" / "0_x.jpg", 0)
    draw_image(tmp_path / "images" / f"{zlib.crc32(urls[1].encode())}.png", 1)
    draw_image(tmp_path / "images" / "00" / "000000002.webp", 2)
    if kind == "sbu":
        source = tmp_path / "sbu.json"
        source.write_text(json.dumps({"image_urls": urls, "captions": texts, "user_names": []}))
    else:
        source = tmp_path / f"{kind}.tsv"
        pairs = zip(texts, urls, strict=True) if kind == "cc3m" else zip(urls, texts, strict=True)
        source.write_text("".join("\t".join(pair) + "\n" for pair in pairs))
    manifest, samples = converted(kind, source, images=tmp_path / "images")
    assert [s["captions"] for s in samples.values()] == [["caption 0"], ["caption 1"], ["caption 2"]]
    assert [s["url"] for s in samples.values()] == urls[:3]
    assert manifest["samples"] == 3
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: no image of the 4 rows of"):
        converted(kind, source, tmp_path / "b", images=tmp_path / "none")


def test_sbu_as_two_texts(tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    (tmp_path / "SBU_captioned_photo_dataset_urls.txt").write_text("http://f/1_a.jpg\nhttp://f/2_b.jpg\n")
    (tmp_path / "SBU_captioned_photo_dataset_captions.txt").write_text("one\ntwo\n")
    draw_image(tmp_path / "2_b.jpg", 2)
    _, samples = converted("sbu", tmp_path, images=tmp_path)
    assert [s["captions"] for s in samples.values()] == [["two"]]
    (tmp_path / "SBU_captioned_photo_dataset_captions.txt").write_text("one\n")
    with pytest.raises(DataError, match="2 addresses but 1 captions"):
        converted("sbu", tmp_path, images=tmp_path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables(kind: str, tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    for n in range(2):
        draw_image(tmp_path / "images" / f"{n}.jpg", n)
    rows = [{"filepath": f"{n // 2}.jpg", "title": f'a "quoted", text {n}'} for n in range(3)]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import csv

        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, ["filepath", "title"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    _, samples = converted("table", path, images=tmp_path / "images")
    assert samples["0"]["captions"] == ['a "quoted", text 0', 'a "quoted", text 1']
    assert samples["1"]["captions"] == ['a "quoted", text 2']
    with pytest.raises(DataError, match="no column 'words': there are filepath, title"):
        converted("table", path, tmp_path / "b", images=tmp_path / "images", columns={"caption": "words"})
    with pytest.raises(ConfigError, match="columns names 'sound'"):
        converted("table", path, tmp_path / "b", columns={"sound": "title"})


def test_parquet_with_the_images_inside(tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": {"bytes": draw_image(tmp_path / f"{n}.jpg", n).read_bytes(), "path": None}, "text": f"text {n}"}
        for n in range(5)
    ]
    (tmp_path / "p").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p" / "a.parquet", row_group_size=2)
    manifest, samples = converted("table", tmp_path / "p", size="2")
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 2, 1]
    assert [s["captions"] for s in samples.values()] == [[f"text {n}"] for n in range(5)]


def test_parquet_without_pyarrow(tmp_path: Path, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="Parquet needs pyarrow: pip install"):
        converted("table", tmp_path / "a.parquet")


def test_jsonl_and_folder(tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    draw_image(tmp_path / "d" / "x.y.png", 1)
    draw_image(tmp_path / "d" / "sub" / "b.bmp", 2)
    (tmp_path / "d" / "x.y.txt").write_text("one\n\ntwo\n")
    (tmp_path / "d" / "sub" / "b.json").write_text('{"captions": ["three"], "domain": "in"}')
    draw_image(tmp_path / "d" / "silent.png", 3)
    manifest, samples = converted("folder", tmp_path / "d", tmp_path / "a")
    assert {key: s["captions"] for key, s in samples.items()} == {"sub_b": ["three"], "x_y": ["one", "two"]}
    assert samples["sub_b"]["domain"] == "in"
    assert samples["sub_b"]["member"] == "sub_b.png"  # BMP is not a kind that shards hold
    assert manifest["bad"] == {"no caption": 1}

    lines = [{"image": "d/x.y.png", "captions": ["a", "b"], "source": "me"}, {"image": "d/sub/b.bmp", "caption": "c"}]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    _, samples = converted("jsonl", path, tmp_path / "b")
    assert [(s["captions"], s.get("source")) for s in samples.values()] == [(["a", "b"], "me"), (["c"], None)]
    path.write_text('{"image": "d/x.y.png", "captions": ["a"]}\n{"captions": []}')
    with pytest.raises(DataError, match="set.jsonl: line 2 is no JSON object with an image"):
        converted("jsonl", path, tmp_path / "c")
    with pytest.raises(DataError, match="gone: no such file or folder"):
        converted("folder", tmp_path / "gone")
