"""A run finds the stage 1 it began from, wherever it is used from and whatever lies between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blip2.configs import RunConfig, to_dict
from blip2.errors import CheckpointError
from blip2.recipes import tiny
from blip2.weights import runs
from blip2.weights.formats import open_checkpoint, stage1_behind
from blip2.weights.lazy_tensors import lazily


def run(folder: Path, config: RunConfig, init: str | None, step: int | None = None) -> Path:
    """A run folder with one weight in it, as a finished run or a checkpoint of one."""
    config = replace(config, init=init)
    place = folder if step is None else folder / "checkpoints" / f"step-{step:06d}"
    place.mkdir(parents=True)
    runs.write_weights(place / runs.WEIGHTS, lazily({"x": torch.ones(1)}), to_dict(config))
    runs.write_config(folder, config)
    return folder


def behind(folder: Path) -> Path:
    """Folder of the stage 1 that the run in `folder` began from."""
    init = open_checkpoint(folder).config.init
    assert init is not None
    return Path(stage1_behind(init, folder).source).parent.resolve()


def test_a_run_started_from_tiny_has_tinys_stage1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("stage1"), tiny.stage1(), None)  # of the name that the packaged run gives its own stage 1
    mine = run(Path("runs/mine"), tiny.answers(), "tiny", step=3)
    again = run(Path("runs/again"), tiny.vqa(), "runs/mine")
    packaged = Path(open_checkpoint("tiny/stage1").source).parent.resolve()
    assert behind(mine) == behind(again) == behind(again.resolve()) == packaged
    assert Path(stage1_behind("tiny").source).parent.resolve() == packaged


def test_runs_that_moved_together_find_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder, where in ((project, ""), (elsewhere, str(elsewhere / "gone") + "/")):
        run(folder / "runs/a/s1", tiny.stage1(), None)
        run(folder / "runs/b/s2", tiny.stage2(), f"{where}runs/a/s1" if not where else f"{where}s1", step=1)
        run(folder / "runs/b/s3", tiny.answers(), f"{where}runs/b/s2", step=1)
    (elsewhere / "runs/a/s1").rename(elsewhere / "runs/b/s1")
    monkeypatch.chdir(project)
    assert behind(Path("runs/b/s3")) == (project / "runs/a/s1").resolve()
    assert behind(elsewhere / "runs/b/s3") == (elsewhere / "runs/b/s1").resolve()  # absolute paths of a machine before
    monkeypatch.chdir(tmp_path)
    assert behind(Path("project/runs/b/s3")) == (project / "runs/a/s1").resolve()


def test_a_parent_that_is_gone_is_named_with_its_child(tmp_path: Path) -> None:
    run(tmp_path / "s2", tiny.stage2(), "runs/gone")
    with pytest.raises(
        CheckpointError, match=r"s2/model.safetensors began from runs/gone, and runs/gone: no such folder"
    ):
        stage1_behind(str(tmp_path / "s2"))
