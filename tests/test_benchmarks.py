"""What the benchmarks rest on: inputs as stated, sides that take turns, and a difference that is not passed over."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.claims import growth
from benchmarks.experiments import capfilt_rate, capfilt_training
from benchmarks.experiments.flickr8k_tiny import derangement, shuffled_image_check
from benchmarks.harness import on_card, profiling, run
from benchmarks.harness.common import SIZES, BenchmarkError, Peer, captions, compare, settings_of, text_lengths

from blip2.data.shards.reader import read_raw
from blip2.data.shards.writer import write_shard
from blip2.metrics.captioning import cider

TINY = SIZES["tiny"]
JPEG = b"\xff\xd8\xff of nothing"


@pytest.mark.parametrize(("count", "mean"), [(16, 12), (3, 9), (200, 12)])
def test_lengths_of_captions_have_the_stated_mean(count: int, mean: int) -> None:
    lengths = text_lengths(count, replace(SIZES["paper"], mean_text=mean))
    assert lengths.sum() == mean * count
    assert lengths.min() >= 4
    assert lengths.max() <= 32
    assert len(set(lengths.tolist())) > 1
    assert [len(text.split()) for text in captions(count, replace(SIZES["paper"], mean_text=mean))] == lengths.tolist()


SIDE = """
import time
import numpy as np
from benchmarks.harness.worker import Side

def side(settings):
    values = np.full((2, 2), settings["value"])
    held = []
    def run():
        held[:] = [np.ones(int(settings["mb"] * 125_000))]
        time.sleep(settings["value"] / 50)
    return Side(run, lambda: {"values": values})
"""


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Compare a side that gives 1.0 and sleeps 20 ms with one of other settings."""
    (tmp_path / "plain_side.py").write_text(SIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = argparse.Namespace(device="cpu", threads=1, profile=False)
    settings = settings_of(options, TINY, tmp_path, value=1.0, mb=10)

    def run_both(**theirs: Any) -> dict[str, Any]:
        peers = {"peer": Peer("plain_side:side", settings=theirs)}
        return compare({}, Peer("plain_side:side"), peers, settings, repeats=3, tolerance=0.01)

    return run_both


def test_sides_are_compared_timed_and_weighed(both: Callable[..., dict[str, Any]]) -> None:
    record = both(value=1.005, mb=210)
    assert record["max_abs_diff"] == pytest.approx(0.005)
    assert record["ours_s"] >= 0.02
    assert record["peer_s"] >= 0.02
    assert 180 < record["peer_peak_mb"] - record["ours_peak_mb"] < 420  # an old array may outlive a new one


def test_other_outputs_are_an_error(both: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(BenchmarkError, match=r"values differs between ours and peer by 0\.5"):
        both(value=1.5)


def test_a_side_that_ends_is_an_error(both: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(BenchmarkError, match=r"(?s)plain_side:side ended: .*TypeError"):
        both(mb=None)


def test_exponent_is_the_slope_of_the_upper_half() -> None:
    points = [{"batch": n, "s": max(1.0, 0.5 * n**2)} for n in (1, 2, 4, 8)]
    assert growth.exponent(points, "batch", "s") == 2.0


def test_table_shows_misses_and_reasons() -> None:
    record = {"claim": "c", "ratio": 1.5, "target": 2.0, "ours_s": 1, "peer_s": 1.5, "peer": "p", "max_abs_diff": 0.0}
    found = {"machine": {"cores": 2, "gpu": None}, "claims": {"a": record, "b": {"skipped": "no peer"}}}
    text = run.table("title", found)
    assert "| c | 1.5 (missed) | at least 2.0 |" in text
    assert "- b: not run: no peer" in text
    assert "gpu" not in text


def test_profile_counts_time_by_kind_and_the_tensors_of_a_run() -> None:
    held, sparse = torch.ones(500, 500), torch.ones(3, 3).to_sparse()  # 1 MB, and what has no storage

    def step() -> None:
        product = held @ held
        torch.softmax(product * 2, dim=-1).topk(3)

    found = profiling.profiled(step)
    assert {"matrix products", "norms, softmax, GELU, losses", "search"} <= set(found["seconds"])
    assert found["held_mb"] >= 1
    assert sparse.is_sparse
    assert found["added_mb"] == 3  # the product, twice it, and its softmax; top 3 are 12 kB
    record = {"claim": "c", "profiles": {"ours": {"seconds": {"search": 1.0}}, "peer": {"seconds": {"copies": 2.0}}}}
    assert run.profile_table(record)[4:] == [
        "| search | 1.0 | 0 |",
        "| copies | 0 | 2.0 |",
        "| seconds in all | 1.0 | 2.0 |",
    ]


def test_every_claim_names_a_script_and_messages_lose_their_paths() -> None:
    for module, *_ in run.CLAIMS.values():
        assert (run.ROOT / "benchmarks" / "claims" / f"{module}.py").is_file()
    assert run.without_paths("no /home/someone/x/y.py here") == "no .../y.py here"


def test_half_of_the_captions_are_exchanged_and_what_a_filter_finds_is_counted(tmp_path: Path) -> None:
    rows = [(f"k{n}", JPEG, {"captions": [f"text {n} {m}" for m in range(5)]}) for n in range(20)]
    write_shard(tmp_path / "a.tar", rows[:12])
    write_shard(tmp_path / "b.tar", rows[12:])
    truth = capfilt_training.make_noisy(str(tmp_path), tmp_path / "noisy")
    assert truth == {key: tuple(entry["captions"]) for key, _, entry in rows}
    found = [one for name in "ab" for one in read_raw(tmp_path / "noisy" / f"{name}.tar")]
    assert [one.key for one in found] == [key for key, *_ in rows]
    texts = sorted(text for one in found for text in one.entry["captions"])
    assert texts == sorted(text for own in truth.values() for text in own)
    told = capfilt_training.quality(tmp_path / "noisy", truth)
    assert (told["images"], told["captions"]) == (20, 100)
    assert told["right"] == pytest.approx(0.5, abs=0.1)  # a caption may move to another place of its own image

    entry = {"captions": ["text 0 1", "text 7 0"], "rejected": [{"text": "text 0 0"}, {"text": "x"}, {"text": "y"}]}
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "a.tar", [("k0", JPEG, entry)])
    told = capfilt_training.quality(tmp_path / "out", truth)
    assert told == {
        "images": 1,
        "captions": 2,
        "right": 0.5,
        "rejected": 3,
        "wrong_of_rejected": 0.6667,
        "rejected_of_wrong": 0.6667,
    }


def test_rate_leaves_out_the_first_shard_of_every_worker() -> None:
    assert capfilt_rate.rate_of([20.0, 24.0, 28.0, 32.0], workers=1, size=8) == 2.0
    assert capfilt_rate.rate_of([20.0, 21.0, 24.0, 25.0, 28.0, 29.0], workers=2, size=8) == 4.0


def test_a_part_that_fails_on_a_card_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(code: str, limit: float = 60) -> on_card.Part:
        return lambda here, left: {"said": on_card.call(["-c", code], left, limit=limit).strip()}

    failing = "import sys; sys.exit('Traceback ...\\nblip2: the reason\\n=====')"
    parts = {
        "good": command("print(3)"),
        "bad": command(failing),
        "missing": command("import sys; sys.exit('blip2: this needs x: pip install x')"),
        "slow": command("import time; time.sleep(60)", limit=0.5),
        "last": command("print(4)"),
    }
    monkeypatch.setattr(on_card, "PARTS", parts)
    monkeypatch.setattr(on_card, "claims", dict)
    monkeypatch.setattr("sys.argv", ["on_card", "--device", "cpu", "--out", str(tmp_path)])
    assert on_card.main() == 1
    (path,) = tmp_path.glob("*-card.json")
    found = json.loads(path.read_text())["parts"]
    assert [found[name].get("said") for name in ("good", "last")] == ["3", "4"]
    assert found["bad"]["failed"] == "blip2: the reason"
    assert found["missing"]["not run"] == "blip2: this needs x: pip install x"
    assert "not done after" in found["slow"]["failed"]
    assert "| bad | failed: blip2: the reason |" in path.with_suffix(".md").read_text()
    assert "slow: failed: it was not done after" in capsys.readouterr().out


def test_derangement_leaves_none_in_place() -> None:
    for count in range(2, 12):
        for seed in range(20):
            order = derangement(count, seed)
            assert sorted(order) == list(range(count))
            assert all(i != j for i, j in enumerate(order))
    assert derangement(50, 1) == derangement(50, 1) != derangement(50, 2)


CAPTIONS = ["a dog runs on the beach", "two men play a guitar", "a red car in the snow", "the child eats an apple"]


def test_shuffled_image_check_tells_seeing_from_guessing() -> None:
    references = [[c, f"{c} today"] for c in CAPTIONS]
    seeing = shuffled_image_check(CAPTIONS, references, seed=3)
    assert seeing["right"] == pytest.approx(cider(CAPTIONS, references))
    assert seeing["right"] > 10 * seeing["shuffled"]
    blind = shuffled_image_check(["a dog runs on the beach"] * 4, references, seed=3)
    # One caption for all: the mean over images is the same whichever references each meets.
    assert blind["right"] == pytest.approx(blind["shuffled"])
