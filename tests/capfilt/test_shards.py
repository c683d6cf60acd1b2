"""Shard in, shard out with a captioner and a ranker made by hand: kills, records, parts, refusals."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip2.capfilt.pipeline import find_jobs, part_of
from blip2.capfilt.settings import CapFiltSettings, Prompt
from blip2.capfilt.shards import Job, filter_shard, finished, seed_of
from blip2.data.shards.writer import write_shard
from blip2.data.sources import open_collection
from blip2.errors import ConfigError, DataError, RunError

SETTINGS = CapFiltSettings("captioner", "ranker", samples=3, keep=2, batch=2)


class Drawn:
    """Captions "grey G draw R": the image's grey value and a number of torch's generator; kills after a while."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.left = dies_after

    def captions(self, images: Sequence[Image.Image], prompts: Sequence[Prompt], count: int) -> list[list[str]]:
        assert len(prompts) == len(images)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return [[f"grey {grey(p)} draw {int(torch.randint(1000, ()))}" for _ in range(count)] for p in images]


class ByGrey:
    """A text that names the image's grey value scores 1, less its draw in thousandths; any other -1."""

    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[self.score(p, text) for text in own] for p, own in zip(images, texts, strict=True)]

    def matches(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[float(s > 0) for s in own] for own in self.scores(images, texts)]

    def score(self, image: Image.Image, text: str) -> float:
        words = text.split()
        if f"grey {grey(image)}" not in text:
            return -1.0
        return 1 - int(words[words.index("draw") + 1]) / 1000 if "draw" in words else 0.5


def grey(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five samples; web texts of the first two are true, one image is broken."""
    folder = tmp_path / "in"
    folder.mkdir()
    rows: list[tuple[str, bytes, dict[str, Any]]] = []
    for n in range(5):
        text = f"grey {n * 10}" if n < 2 else "click here"
        entry = {"image_id": f"i{n}", "captions": [text], "url": f"u{n}"}
        rows.append((f"k{n}", png(n * 10) if n != 3 else b"\x89PNG\r\n\x1a\nbroken", entry))
    write_shard(folder / "a.tar", rows)
    return folder / "a.tar"


def entries(path: Path) -> dict[str, dict[str, Any]]:
    with tarfile.open(path) as tar:
        names = [name for name in tar.getnames() if name.endswith(".json")]
        return {name[:-5]: json.loads(tar.extractfile(name).read()) for name in names}  # type: ignore[union-attr]


def run(source: Path, out: Path, settings: CapFiltSettings = SETTINGS, captioner: Any = None) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return filter_shard(Job(str(source), str(out)), settings, captioner or Drawn(), ByGrey())


def test_best_texts_are_kept_with_their_provenance(source: Path, tmp_path: Path) -> None:
    record = run(source, tmp_path / "out")
    written = entries(tmp_path / "out" / "a.tar")
    assert list(written) == ["k0", "k1", "k2", "k4"]
    for key, entry in written.items():
        assert len(entry["captions"]) == len(entry["provenance"]) == 2
        assert all(f"grey {int(key[1]) * 10}" in text for text in entry["captions"])
        scores = [one["score"] for one in entry["provenance"] + entry["rejected"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 4
        assert entry["url"] == f"u{key[1]}"
    assert (record["samples"], record["bad"], record["web"] + record["synthetic"]) == (4, 1, 8)
    assert record["rejected"] == 8
    images = {s.key: s.read() for s in open_collection(str(source)).samples}
    assert all(s.read() == images[s.key] for s in open_collection(str(tmp_path / "out")).samples)


def test_threshold_leaves_out_images_without_a_matching_text(source: Path, tmp_path: Path) -> None:
    settings = CapFiltSettings("c", "r", samples=0, itm_threshold=0.5, batch=2)
    record = run(source, tmp_path / "out", settings)
    written = entries(tmp_path / "out" / "a.tar")
    assert {key: entry["captions"] for key, entry in written.items()} == {"k0": ["grey 0"], "k1": ["grey 10"]}
    assert record["emptied"] == 2
    assert written["k0"]["provenance"] == [{"source": "web", "score": 0.5, "itm": 1.0}]


def test_killed_worker_leaves_nothing_and_its_rerun_is_byte_equal(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole")
    out = tmp_path / "out"
    for batches in range(3):
        torch.manual_seed(batches)  # what was drawn before must not matter
        with pytest.raises(KeyboardInterrupt):
            run(source, out, captioner=Drawn(dies_after=batches))
        assert [p for p in out.rglob("*") if p.is_file()] == []
    (out / ".a.tar.tmp-elsewhere-1").write_bytes(b"of a process killed by the system")
    before = torch.random.get_rng_state()
    run(source, out)
    assert (torch.random.get_rng_state() == before).all()
    assert (out / "a.tar").read_bytes() == (tmp_path / "whole" / "a.tar").read_bytes()
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == ["a.tar", "a.tar.json"]


def test_finished_shard_is_skipped_and_a_changed_one_is_not(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = run(source, out)
    job = Job(str(source), str(out))
    assert run(source, out, captioner=Drawn(dies_after=0)) == record
    assert finished(job, SETTINGS) == record
    with pytest.raises(RunError, match=r"a.tar: was made with keep = 2, not 3: choose another OUT"):
        finished(job, CapFiltSettings("captioner", "ranker", samples=3, keep=3, batch=2))
    (out / "a.tar").write_bytes(b"cut")
    assert finished(job, SETTINGS) is None
    run(source, out)
    write_shard(source, [("z", png(3), {"captions": ["grey 3"]})])
    assert finished(job, SETTINGS) is None


def test_seed_follows_keys_and_seed() -> None:
    assert seed_of(0, ["a", "b"]) == seed_of(0, ["a", "b"])
    assert len({seed_of(0, ["a", "b"]), seed_of(0, ["ab"]), seed_of(0, ["b", "a"]), seed_of(1, ["a", "b"])}) == 4
    assert all(0 <= seed_of(n, ["x"]) < 2**63 for n in range(50))


def test_jobs_and_parts(source: Path, tmp_path: Path) -> None:
    for name in "bcde":
        write_shard(source.with_name(f"{name}.tar"), [])
    jobs = find_jobs(str(source.parent), str(tmp_path / "out"))
    parts = [part_of(jobs, f"{n}/2") for n in range(2)]
    assert [[Path(job.source).stem for job in part] for part in parts] == [["a", "c", "e"], ["b", "d"]]
    for bad in ("2/2", "x", "0/0", "-1/2"):
        with pytest.raises(ConfigError, match="it must be I/N"):
            part_of(jobs, bad)
    with pytest.raises(DataError, match="shards are read from it: choose another OUT"):
        find_jobs(str(source.parent), str(source.parent))
    other = tmp_path / "other"
    other.mkdir()
    write_shard(other / "a.tar", [])
    with pytest.raises(DataError, match="2 shards are named a.tar"):
        find_jobs(str(tmp_path / "{in,other}" / "a.tar"), str(tmp_path / "out"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: no .tar shards: make them with"):
        find_jobs(str(tmp_path / "none"), str(tmp_path / "out"))


@pytest.mark.parametrize(("name", "value"), [("keep", 0), ("samples", -1), ("batch", 0), ("itm_threshold", 1.5)])
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        CapFiltSettings("c", **{name: value})


def test_a_label_is_part_of_prompt_and_caption() -> None:
    settings = CapFiltSettings("captioner", prompt="a photo of {label} and {place}")
    entry = {"label": "a tabby cat", "place": "a mat", "captions": []}
    assert settings.prompt_for(entry) == Prompt("a photo of a tabby cat and a mat", "a tabby cat and a mat")
    for other in ({}, {"label": "a cat", "place": " "}, {"label": ["a"], "place": "b"}):
        assert settings.prompt_for(other) == Prompt(None)
    assert CapFiltSettings("c", prompt="a photo of").prompt_for(entry) == Prompt("a photo of")
    assert CapFiltSettings("c", prompt="{{a}} {label}").prompt_for({"label": "b"}).text == "{a} b"
    for wrong in ("a {label", "a } b", "a {} b", "a {0} b", "a {label.x}"):
        with pytest.raises(ConfigError, match="prompt"):
            CapFiltSettings("captioner", prompt=wrong)
