"""A run folder belongs to one run: what may change when it is resumed, and what may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from blip2.configs import OptimConfig, RunConfig, TrainConfig
from blip2.errors import ConfigError
from blip2.training.initialise import CHANGEABLE, claim, run_folder
from blip2.weights import runs


def test_a_run_lives_where_it_says_or_under_its_recipes_name() -> None:
    assert run_folder(RunConfig(recipe="tiny/stage1")) == Path("runs/tiny-stage1")
    assert run_folder(RunConfig(recipe="tiny/stage1", out="elsewhere/s1")) == Path("elsewhere/s1")


def test_a_new_folder_holds_the_configuration(tmp_path: Path) -> None:
    config = RunConfig(train=TrainConfig(steps=7))
    claim(tmp_path / "new" / "run", config)
    assert runs.read_config(tmp_path / "new" / "run") == config


def test_a_resumed_run_may_go_on_for_longer(tmp_path: Path) -> None:
    config = RunConfig()
    claim(tmp_path, config)
    longer = replace(config, train=replace(config.train, steps=5000, precision="fp32"), out=str(tmp_path))
    claim(tmp_path, longer)
    assert runs.read_config(tmp_path) == longer
    assert {"train.steps", "train.precision", "out"} <= CHANGEABLE


def test_another_setting_is_another_run(tmp_path: Path) -> None:
    claim(tmp_path, RunConfig())
    with pytest.raises(
        ConfigError, match=r"is a run with optim.lr = 0.0001, not 0.0005: choose another --out"
    ) as caught:
        claim(tmp_path, RunConfig(optim=OptimConfig(lr=5e-4)))
    assert "\n" not in str(caught.value)
    assert runs.read_config(tmp_path) == RunConfig()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty and not a run folder: choose another --out"):
        claim(tmp_path, RunConfig())
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]
