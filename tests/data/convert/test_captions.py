"""COCO in its three forms, Flickr30k, NoCaps and Visual Genome, from miniature originals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip2.data.sources import open_collection
from blip2.errors import DataError

KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{n:012d}.jpg",
            "cocoid": n,
            "imgid": n - 7,
            "split": split,
            "sentences": [{"raw": f"A dog {n}.", "tokens": ["a", "dog"]}, {"raw": f"One dog {n} ", "tokens": []}],
        }
        for n, split in ((7, "train"), (8, "restval"), (9, "val"), (10, "test"))
    ],
}


@pytest.fixture
def coco(tmp_path: Path, draw_image: Callable[..., Path]) -> Path:
    source = tmp_path / "coco"
    for n in range(7, 11):
        draw_image(source / "val2014" / f"COCO_val2014_{n:012d}.jpg", n)
    (source / "dataset_coco.json").write_text(json.dumps(KARPATHY))
    return source


def test_karpathy(coco: Path, converted: Any, tmp_path: Path) -> None:
    manifest, samples = converted("coco", coco, split="train", licence="CC BY 4.0")
    assert list(samples) == ["COCO_val2014_000000000007", "COCO_val2014_000000000008"]
    assert samples["COCO_val2014_000000000008"] == {
        "image_id": "8",
        "captions": ["A dog 8.", "One dog 8"],
        "split": "restval",
        "member": "COCO_val2014_000000000008.jpg",
    }
    assert (manifest["samples"], manifest["captions"], manifest["licence"]) == (2, 4, "CC BY 4.0")
    assert len(converted("coco", coco, tmp_path / "all")[1]) == 4
    assert [s.image_id for s in open_collection(str(tmp_path / "out")).samples] == ["7", "8"]
    with pytest.raises(DataError, match="dataset_coco.json: no image of split 'dev'"):
        converted("coco", coco, tmp_path / "dev", split="dev")


def test_lavis_and_original_forms(coco: Path, converted: Any, tmp_path: Path) -> None:
    names = [f"val2014/COCO_val2014_{n:012d}.jpg" for n in (7, 8)]
    rows = [{"image": names[0], "caption": c, "image_id": "coco_7"} for c in ("one", "two")]
    rows.append({"image": names[1], "caption": ["three", "four"]})
    (coco / "coco_karpathy_train.json").write_text(json.dumps(rows))
    _, samples = converted("coco", coco / "coco_karpathy_train.json", tmp_path / "a")
    assert [s["captions"] for s in samples.values()] == [["one", "two"], ["three", "four"]]
    assert [s["image_id"] for s in samples.values()] == ["coco_7", "COCO_val2014_000000000008"]
    original = {
        "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}],
        "annotations": [{"id": n, "image_id": 9, "caption": c} for n, c in enumerate(("five", "six"))],
    }
    (coco / "annotations").mkdir()
    (coco / "annotations" / "captions_val2014.json").write_text(json.dumps(original))
    (coco / "dataset_coco.json").unlink()
    _, samples = converted("coco", coco, tmp_path / "b", split="val")
    assert samples["COCO_val2014_000000000009"]["captions"] == ["five", "six"]


def test_nocaps_keeps_the_domain(tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    domains = ("in-domain", "near-domain", "out-domain")
    data = {
        "images": [
            {"id": n, "file_name": f"{n:02x}.jpg", "open_images_id": f"o{n}", "domain": d}
            for n, d in enumerate(domains)
        ],
        "annotations": [{"image_id": n, "caption": f"caption {n} {k}"} for n in range(3) for k in range(10)],
    }
    for n in range(3):
        draw_image(tmp_path / "images" / f"{n:02x}.jpg", n)
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps(data))
    _, samples = converted("nocaps", tmp_path, images=tmp_path / "images")
    assert [s["domain"] for s in samples.values()] == ["in", "near", "out"]
    assert [s["open_images_id"] for s in samples.values()] == ["o0", "o1", "o2"]
    assert all(len(s["captions"]) == 10 for s in samples.values())
    data["images"][1]["domain"] = "far"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"nocaps_val.*domain 'far' is none of in-domain"):
        converted("nocaps", path, tmp_path / "b", images=tmp_path / "images")


@pytest.mark.parametrize("form", ["token", "csv", "json"])
def test_flickr30k(form: str, tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    for n in (1, 2):
        draw_image(tmp_path / "images" / f"{n}.jpg", n)
    if form == "token":
        lines = [f"{n}.jpg#{k}\tA man {n} {k} ." for n in (1, 2) for k in range(2)]
        (tmp_path / "results_20130124.token").write_text("\n".join(lines) + "\n")
    elif form == "csv":
        lines = [f"{n}.jpg| {k}| A man {n} {k} ." for n in (1, 2) for k in range(2)]
        (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n" + "\n".join(lines))
    else:
        sentences = [[{"raw": f"A man {n} {k} ."} for k in range(2)] for n in (1, 2)]
        images = [
            {"filename": f"{n}.jpg", "imgid": n, "split": "test", "sentences": s}
            for n, s in zip((1, 2), sentences, strict=True)
        ]
        (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    _, samples = converted("flickr30k", tmp_path, images=tmp_path / "images")
    assert {key: s["captions"] for key, s in samples.items()} == {
        str(n): [f"A man {n} 0 .", f"A man {n} 1 ."] for n in (1, 2)
    }


def test_visual_genome(tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    draw_image(tmp_path / "VG_100K" / "3.jpg", 3)
    draw_image(tmp_path / "VG_100K_2" / "4.jpg", 4)
    regions = [
        {"region_id": k, "x": k, "y": 1, "width": 5, "height": 6, "phrase": p, "image_id": 3}
        for k, p in enumerate(("a red bus", "the sky ", "a red bus"))
    ]
    data = [{"id": 3, "regions": regions}, {"id": 4, "regions": regions[:1]}]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(data))
    (tmp_path / "image_data.json").write_text(json.dumps([{"image_id": 3, "coco_id": 77}, {"image_id": 4}]))
    _, samples = converted("vg", tmp_path)
    assert samples["vg-3"]["captions"] == ["a red bus", "the sky"]
    assert samples["vg-3"]["boxes"] == [[0, 1, 5, 6], [1, 1, 5, 6]]
    assert samples["vg-3"]["coco_id"] == "77"
    assert "coco_id" not in samples["vg-4"]


def test_bad_originals(coco: Path, converted: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such annotation file or folder"):
        converted("coco", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no annotation file in it: expected dataset_coco.json or coco_karp"):
        converted("coco", tmp_path / "empty")
    (coco / "broken.json").write_text('{"images": [')
    with pytest.raises(DataError, match="broken.json: not valid JSON"):
        converted("coco", coco / "broken.json")
    (coco / "other.json").write_text('{"sounds": []}')
    with pytest.raises(DataError, match="other.json: not an annotation file of captions"):
        converted("coco", coco / "other.json")
    (coco / "half.json").write_text('{"images": [{"filename": "a.jpg"}]}')
    with pytest.raises(DataError, match="half.json: not Karpathy's split file .'sentences' is missing"):
        converted("coco", coco / "half.json")
    with pytest.raises(DataError, match="nowhere: no such folder of images"):
        converted("coco", coco, images=tmp_path / "nowhere")


def test_missing_image(coco: Path, converted: Any, tmp_path: Path) -> None:
    gone = coco / "val2014" / "COCO_val2014_000000000009.jpg"
    gone.unlink()
    with pytest.raises(DataError, match=r"000000000009.jpg: the image of COCO_val2014_000000000009 is missing: give"):
        converted("coco", coco)
    manifest, samples = converted("coco", coco, skip_missing=True)
    assert len(samples) == 3
    assert manifest["bad"] == {"no image": 1}
    assert json.loads((tmp_path / "out" / "left_out.jsonl").read_text()) == {"key": gone.stem, "bad": "no image"}
