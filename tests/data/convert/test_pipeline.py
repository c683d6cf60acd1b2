"""Conversions that stop and go on, checksums, duplicates, leaks, and many processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip2.cli.main import main
from blip2.data.convert import pipeline
from blip2.data.shards import writer
from blip2.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path: Path, draw_image: Callable[..., Path]) -> Path:
    """Ten images as JSON lines; 5 is a small copy of 1, and 6 is 1 again under the same image_id."""
    lines = []
    for n in range(10):
        path = draw_image(tmp_path / "images" / f"{n}.png", n)
        if n in (5, 6):
            path = path.with_suffix(".jpg")
            Image.open(tmp_path / "images" / "1.png").resize((70, 70)).save(path, quality=70)
        image_id = "same" if n in (1, 6) else str(n)
        lines.append(json.dumps({"image": f"images/{path.name}", "captions": [f"text {n}"], "image_id": image_id}))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    return tmp_path / "set.jsonl"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_manifest_and_checksums(source: Path, converted: Any, tmp_path: Path) -> None:
    manifest, samples = converted("jsonl", source, size="4", licence="CC0")
    assert [shard["file"] for shard in manifest["shards"]] == [f"jsonl-{n:05d}.tar" for n in range(3)]
    for shard in manifest["shards"]:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert (manifest["samples"], manifest["captions"], len(samples)) == (10, 10, 10)
    assert manifest["near_duplicates"] == {"found": 1, "dropped": False}
    assert not [p for p in (tmp_path / "out").rglob("*") if ".tmp" in p.name]


def test_shards_of_a_size_in_bytes(source: Path, converted: Any) -> None:
    manifest, _ = converted("jsonl", source, size="10KB")
    images = {f"{n}.png": p.stat().st_size for n, p in enumerate(sorted(source.parent.glob("images/*.png")))}
    assert len(manifest["shards"]) > 1
    assert sum(shard["samples"] for shard in manifest["shards"]) == 10
    assert all(shard["bytes"] < 10_000 + max(images.values()) + 10 * 3 * 1024 for shard in manifest["shards"])


def test_duplicates_are_dropped(source: Path, converted: Any, tmp_path: Path) -> None:
    manifest, samples = converted("jsonl", source, size="4", drop_duplicates=True)
    assert manifest["near_duplicates"] == {"found": 1, "dropped": True}
    assert "6-5" not in samples
    assert "7-6" in samples  # the same image by its image_id
    (line,) = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["key"], record["duplicate"], record["dropped"]) == ("6-5", "2-1", True)
    assert record["bits"] <= 6


def test_leaks_are_dropped(source: Path, converted: Any, tmp_path: Path, draw_image: Callable[..., Path]) -> None:
    evaluation = tmp_path / "test-set"
    evaluation.mkdir()
    Image.open(tmp_path / "images" / "3.png").resize((90, 70)).save(evaluation / "secret.jpg", quality=60)
    draw_image(evaluation / "new.png", 1000)
    manifest, samples = converted("jsonl", source, against=(str(evaluation),))
    assert manifest["leaks"] == {str(evaluation): 1}
    assert "4-3" not in samples
    assert len(samples) == 9
    lines = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert next(line for line in lines if "leak" in line)["leak"] == "secret.jpg"
    with pytest.raises(DataError, match="nothing: no such file or folder"):
        converted("jsonl", source, tmp_path / "b", against=(str(tmp_path / "nothing"),))


def test_stopped_conversion_goes_on(
    source: Path, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    converted("jsonl", source, whole, size="2")
    write, written = pipeline.write_shard, []

    def dies(path: Path, samples: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, samples)

    monkeypatch.setattr(pipeline, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        converted("jsonl", source, stopped, size="2")
    assert not (stopped / "manifest.json").exists()
    monkeypatch.setattr(pipeline, "write_shard", lambda p, s: (written.append(p.name), write(p, s))[1])
    monkeypatch.setattr(pipeline, "scan_unit", lambda *a, **k: pytest.fail("scanned again"))
    converted("jsonl", source, stopped, size="2")
    assert sorted(written) == [f"jsonl-{n:05d}.tar" for n in range(5)]  # none twice
    assert contents(stopped) == contents(whole)


def test_other_options_redo_only_what_they_change(
    source: Path, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted("jsonl", source, size="2")
    write, written = writer.write_shard, []
    monkeypatch.setattr(pipeline, "write_shard", lambda p, s: (written.append(p.name), write(p, s))[1])
    converted("jsonl", source, size="2", drop_duplicates=True)
    assert written == ["jsonl-00002.tar"]  # which holds the copy
    converted("jsonl", source, size="5")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["jsonl-00000.tar", "jsonl-00001.tar"]


def test_processes_give_the_same_bytes(source: Path, converted: Any, tmp_path: Path) -> None:
    converted("jsonl", source, tmp_path / "one", size="2")
    converted("jsonl", source, tmp_path / "two", size="2", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_refusals(source: Path, converted: Any, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.tar").write_bytes(b"")
    with pytest.raises(DataError, match="foreign: holds mine.tar, which no conversion wrote"):
        converted("jsonl", source, foreign)
    with pytest.raises(ConfigError, match="shard-size is 'many'"):
        converted("jsonl", source, size="many")
    with pytest.raises(ConfigError, match="threshold is 40"):
        converted("jsonl", source, threshold=40)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="every sample is bad, the first: 1-0: not an image"):
        converted("jsonl", source, tmp_path / "b")


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "convert", str(source), str(tmp_path / "cli"), "--from", "jsonl", "--drop-duplicates"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "9 samples in 1 shards" in said
    assert "1  near-duplicates of earlier images: dropped" in said
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 9
    assert main(["data", "convert", str(tmp_path / "no"), str(tmp_path / "x"), "--from", "coco"]) == 2
    assert capsys.readouterr().err.endswith("no: no such annotation file or folder\n")
    assert main(["data", "convert", str(source), str(tmp_path / "x"), "--from", "imagenet"]) == 2
    assert "from is 'imagenet': it must be one of coco, vg" in capsys.readouterr().err
