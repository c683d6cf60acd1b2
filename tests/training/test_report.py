"""The report of a run folder: what it shows, that it is escaped, self-contained, and survives missing pieces."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2.errors import CheckpointError, RunError
from blip2.training import report
from blip2.training.report import read_run, write_report

CONFIG = """recipe: tiny/stage1
stage: stage1
train:
  steps: 200
language:
  prompt: "a <b>photo</b> of"
"""
SUMMARY = {
    "parameters": [
        {"name": "image encoder", "trainable": 0, "frozen": 22_056_576},
        {"name": "Q-Former <x>", "trainable": 30_345_678, "frozen": 0},
    ],
    "seconds": 8640,
    "steps": 200,
    "pairs": 12800,
    "hardware": "2 cores & no GPU",
    "versions": {"torch": "2.13.0", "blip2": "0.1.0"},
    "loaded": ["Q-Former started from <minilm-l6>", "187 tensors from MiniLM-L6; 24 new: cross-attention"],
    "skipped": {"truncated image": 3},
}


def train_line(step: int, **values: float) -> dict[str, Any]:
    line = {"kind": "train", "step": step, "loss": 10 - step / 50, "itc": 4.0, "itm": 0.6, "itg": 5.4 - step / 50}
    rest = {"lr": 1e-4, "grad_norm": 1.5, "pairs_per_s": 11.5, "data_wait": 0.02, "time": 25.0}
    return {**line, **rest, **values}


def dev_line(step: int) -> dict[str, Any]:
    recall = {"i2t_r1": step / 20, "i2t_r10": step / 5, "t2i_r1": step / 25, "t2i_r10": step / 6}
    return {"kind": "dev", "step": step, "loss": 9.5 - step / 60, **recall}


def sample(key: str, caption: str) -> dict[str, Any]:
    return {"key": key, "image": f"thumbs/{key}.jpg", "caption": caption, "references": [f"reference of {key} <i>"]}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run of 200 steps with two images captioned three times."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    lines = [json.dumps(train_line(s)) for s in range(1, 201)] + [json.dumps(dev_line(s)) for s in (50, 100, 200)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    thumbs = tmp_path / "samples" / "thumbs"
    thumbs.mkdir(parents=True)
    for key, color in (("dog1", "peru"), ("sea2", "teal")):
        Image.new("RGB", (64, 48), color).save(thumbs / f"{key}.jpg")
    for step, words in ((50, "a a a"), (100, "a dog"), (200, "a dog <script>alert(1)</script> runs")):
        entries = [sample("dog1", words), sample("sea2", f"the sea at {step}")]
        (tmp_path / "samples" / f"step-{step:06d}.json").write_text(json.dumps(entries))
    return tmp_path


class Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def thumbnails(self) -> list[dict[str, str]]:
        return [image for image in self.all("img") if image["src"].startswith("data:image/jpeg")]

    def curves(self) -> list[dict[str, str]]:
        return [image for image in self.all("img") if image["src"].startswith("data:image/svg")]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_shows_every_section(run_folder: Path) -> None:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    text = Page(path.read_text(encoding="utf-8")).text
    for expected in (
        "tiny/stage1",
        "all 200 steps done",
        "6.490",  # mean training loss of steps 151 to 200: 10 - 175.5 / 50
        "6.167",  # last dev loss
        "R@1033.3%",  # t2i_r10 at step 200
        "2h24m",
        "30.3M trained",
        "22,056,576",
        "24 new: cross-attention",
        "started from <minilm-l6>",
        "11.5",
        "2.0% of the time",
        "2 cores & no GPU",
        "torch 2.13.0, blip2 0.1.0",
        "truncated image",
        "12,800",
        "steps: 200",
    ):
        assert expected in text, expected


def test_evaluations_stand_in_a_table(run_folder: Path) -> None:
    words = page_of(run_folder).text.split()
    start = words.index("dev", words.index("Evaluations"))
    rows = " ".join(words[start + 1 : start + 19])
    assert "steplossi2t_r1i2t_r10t2i_r1t2i_r10" in rows
    # step, loss 9.5 - step / 60, recalls to one decimal
    assert "508.6672.510.02.08.3" in rows
    assert "2006.16710.040.08.033.3" in rows


def test_captions_show_how_they_changed(run_folder: Path) -> None:
    page = page_of(run_folder)
    positions = [page.text.index(words) for words in ("a dog <script>alert(1)</script> runs", "a a a", "a dog\n")]
    assert positions[0] < positions[1]
    assert "reference of dog1 <i>" in page.text
    assert "the sea at 50" in page.text
    images = page.thumbnails()
    assert [image["alt"] for image in images] == [
        "Image dog1: reference of dog1 <i>",
        "Image sea2: reference of sea2 <i>",
    ]
    assert all(image["src"].startswith("data:image/jpeg;base64,/9j/") for image in images)


def test_escapes_and_requests_nothing(run_folder: Path) -> None:
    html = write_report(run_folder).read_text(encoding="utf-8")
    page = Page(html)
    assert page.all("script") == []
    assert page.all("link") == []
    assert page.all("b") == [{}] * html.count("<b>")
    assert "&lt;b&gt;photo&lt;/b&gt;" in html
    assert "http" not in html
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html


def test_curves_are_images_with_words(run_folder: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = page_of(run_folder).curves()
    assert len(curves) == 6
    assert "train from 9.98 to 6" in curves[0]["alt"]
    assert "dev from 8.67 to 6.17" in curves[0]["alt"]
    assert "text to image @10 from 8.33 to 33.3" in curves[2]["alt"]
    # black on nothing, which a dark page inverts
    svg = base64.b64decode(curves[0]["src"].partition(",")[2]).decode()
    assert "<svg" in svg
    assert "#ffffff" not in svg
    assert "invert(1)" in (run_folder / "report.html").read_text()


def test_stage2_has_one_loss_and_no_parts(tmp_path: Path) -> None:
    train = [{"kind": "train", "step": s, "loss": 5.0, "lm": 5.0} for s in (1, 2)]
    dev = {"kind": "dev", "step": 2, "loss": 4.0, "cider": 30.0, "new": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*train, dev]))
    figures = report.figures_of(read_run(tmp_path))
    assert list(figures) == ["Loss", "Scores on dev"]
    # a metric that the page does not know gets its line all the same
    assert [series.label for series in figures["Scores on dev"]] == ["CIDEr", "new"]


def test_repeated_steps_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    lines = [train_line(1), train_line(2, loss=7.0), train_line(3), train_line(2, loss=6.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    run = read_run(tmp_path)
    assert [line["step"] for line in run.train] == [1, 2, 3]
    assert run.train[1]["loss"] == 6.0


def test_answers_are_called_answers(run_folder: Path) -> None:
    assert "Captions of images" in page_of(run_folder).text
    entries = [{**sample("dog1", "what is it? a dog"), "answer": "a dog"}]
    (run_folder / "samples" / "step-000200.json").write_text(json.dumps(entries))
    text = page_of(run_folder).text
    assert "Answers about images" in text
    assert "People answered" in text
    assert "People wrote" not in text


def test_aborted_run_without_samples_or_summary(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    lines = [train_line(1), train_line(2, loss=float("nan")), train_line(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    page = page_of(tmp_path)
    assert "stopped or running: 3 of 200 steps" in page.text
    assert "1m15s" in page.text
    assert "Skipped samples" not in page.text
    assert "nan" not in page.text.lower()


def test_run_that_never_took_a_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    assert "0 of 200 steps" in page_of(tmp_path).text


def test_time_of_a_killed_call_counts(run_folder: Path) -> None:
    # 200 steps of 25 s are in the metrics; the summary knows only the last call.
    (run_folder / "summary.json").write_text(json.dumps({**SUMMARY, "seconds": 900}))
    assert "1h23m" in page_of(run_folder).text


def test_damaged_pieces_are_left_out(run_folder: Path) -> None:
    (run_folder / "config.yaml").write_text("recipe: [unclosed")
    (run_folder / "summary.json").write_text('{"parameters": ')
    (run_folder / "samples" / "step-000200.json").write_text("[{")
    (run_folder / "samples" / "thumbs" / "dog1.jpg").unlink()
    page = page_of(run_folder)
    assert "recipe: [unclosed" in page.text
    assert "no image" in page.text
    assert len(page.thumbnails()) == 1


def test_images_outside_the_samples_are_not_read(run_folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(run_folder / "private.jpg")
    entries = [{**sample("dog1", "x"), "image": "../private.jpg"}, {**sample("sea2", "y"), "image": "step-000050.json"}]
    (run_folder / "samples" / "step-000200.json").write_text(json.dumps(entries))
    assert page_of(run_folder).thumbnails() == []


def test_without_matplotlib_the_page_says_so(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(run_folder)
    assert page.curves() == []
    assert "Curves need matplotlib: pip install 'blip2[train]'" in page.text


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    lines = [json.dumps(train_line(s)) for s in range(1, 5001)] + [json.dumps(dev_line(s)) for s in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = page_of(tmp_path)
    assert "12 of 100 evaluations" in page.text
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_smoothing_and_thinning_by_hand() -> None:
    assert report.smoothed(np.array([1.0, 3.0, 5.0, 1.0]), 1).tolist() == [2.0, 3.0, 3.0, 3.0]
    straight = np.arange(9.0)
    assert report.smoothed(straight, 3)[3:6] == pytest.approx(straight[3:6])
    assert report.thinned([(1, 2), (3, 4), (5, 9)], limit=2).tolist() == [[2.0, 3.0], [5.0, 9.0]]
    assert report.thinned([(1, 2)], limit=2).tolist() == [[1.0, 2.0]]


def test_refuses_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.yaml or metrics.jsonl; give the folder"):
        write_report(tmp_path / "nothing")


def test_unwritable_page_is_one_line(run_folder: Path) -> None:
    (run_folder / "report.html").mkdir()
    with pytest.raises(RunError, match="report.html: cannot be written") as caught:
        write_report(run_folder)
    assert "\n" not in str(caught.value)
    assert not list(run_folder.glob("*.tmp*"))
