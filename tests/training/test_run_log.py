"""`run_log.jsonl` reads as if a run had never stopped, and a full disk is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip2.errors import RunError
from blip2.training import run_log
from blip2.training.run_log import ProgressLine, RunLog, format_seconds


@pytest.fixture(autouse=True)
def board(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """TensorBoard's scalars, kept here instead of in event files."""
    seen: list[tuple[Any, ...]] = []

    class Board:
        def add_scalar(self, *scalar: Any) -> None:
            seen.append(scalar)

        def close(self) -> None:
            seen.append(("closed",))

    monkeypatch.setattr(run_log, "_tensorboard", lambda folder, step: Board())
    return seen


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder: Path, start: int, end: int) -> None:
    log = RunLog(folder, start, 10)
    for step in range(start + 1, end + 1):
        log.write("train", step, {"loss": float(step)})
        if step % 2 == 0:
            log.write("dev", step, {"recall": 0.5})
    log.close()


def test_one_line_each(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    assert lines(tmp_path) == [
        {"kind": "train", "step": 1, "loss": 1.0},
        {"kind": "train", "step": 2, "loss": 2.0},
        {"kind": "dev", "step": 2, "recall": 0.5},
    ]


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    """Killed after step 5, its last checkpoint at 4: the file ends as one of an unbroken run."""
    run(tmp_path, 0, 5)
    run(tmp_path, 4, 7)
    (unbroken := tmp_path / "unbroken").mkdir()
    run(unbroken, 0, 7)
    assert lines(tmp_path) == lines(unbroken)


def test_a_last_line_cut_short_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    for cut in ('{"kind": "train", "st', '{"kind": "train", "step": 4', "\0\0\0"):
        path.write_text(path.read_text() + cut)
        run(tmp_path, 3, 3)
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2, 3]


def test_a_run_that_starts_anew_starts_an_empty_file(tmp_path: Path) -> None:
    """Killed before its first checkpoint: the dev line of step 0 is measured again."""
    for _ in range(2):
        log = RunLog(tmp_path, 0, 10)
        log.write("dev", 0, {"recall": 0.1})
        log.close()
    assert lines(tmp_path) == [{"kind": "dev", "step": 0, "recall": 0.1}]


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    run(tmp_path, 1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_are_mirrored_in_tensorboard(tmp_path: Path, board: list[tuple[Any, ...]]) -> None:
    log = RunLog(tmp_path, 0, 10)
    log.write("dev", 3, {"recall": 0.5, "count": 2, "sample": "a dog"})
    log.close()
    assert board == [("dev/recall", 0.5, 3), ("dev/count", 2, 3), ("closed",)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 10)
    log._file.close()
    log._file = open("/dev/full", "a")  # noqa: SIM115 - closed by the log
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot be written: No space left on device$"):
        log.write("train", 1, {"loss": 1.0})
    log.close()  # what could not be written is given up, without another error


def test_progress_off_a_terminal_prints_seldom(capsys: pytest.CaptureFixture[str]) -> None:
    """The first and the last step, whatever the 20 seconds between lines say."""
    line = ProgressLine(0, 3)
    for step in (1, 2, 3):
        line.show(step, {"loss": 1.25, "itc": 0.5, "pairs_per_s": 12.34, "data_wait": 0.25})
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("step 1/3  loss 1.250  itc 0.500  12.3 pairs/s  data wait 25%  ETA ")
    assert printed[1].startswith("step 3/3")


def test_progress_on_a_terminal_rewrites_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    line = ProgressLine(0, 100)
    line.show(99, {"loss": 10.0})
    line.show(100, {"loss": 1.0})
    line.say("dev at step 100")
    line.close()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.count("\rstep") == 2
    assert shown.endswith("dev at step 100\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3599.6, "1h00m"), (4000, "1h06m"), (36e4, "100h00m")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
