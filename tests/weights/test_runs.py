"""Run folders: which weights are found, and what a user reads when there are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blip2.configs import OptimConfig, QFormerConfig, RunConfig, to_dict
from blip2.errors import CheckpointError, ConfigError
from blip2.recipes import RECIPES
from blip2.weights import runs

CONFIG = RunConfig(qformer=QFormerConfig(queries=7), optim=OptimConfig(betas=(0.9, 0.99), lr=3e-4))


def weights(folder: Path, config: RunConfig = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / runs.WEIGHTS
    save_file({"temp": torch.ones(1)}, path, {"format": "blip2", "config": json.dumps(to_dict(config))})
    return path


def test_a_run_folder_gives_its_newest_whole_weights(tmp_path: Path) -> None:
    for step in (20, 100, 3):
        weights(tmp_path / "checkpoints" / f"step-{step:06d}", replace(CONFIG, recipe=f"at {step}"))
    (tmp_path / "checkpoints" / "step-000200").mkdir()
    weights(tmp_path / "checkpoints" / ".step-000300.tmp-12")
    newest = runs.open_run(tmp_path)
    assert newest.weights == tmp_path / "checkpoints" / "step-000100" / runs.WEIGHTS
    assert newest.config == replace(CONFIG, recipe="at 100")
    assert [step for step, _ in runs.checkpoints(tmp_path)] == [3, 20, 100]


def test_a_checkpoint_and_a_file_can_be_named_too(tmp_path: Path) -> None:
    path = weights(tmp_path / "checkpoints" / "step-000003")
    assert runs.open_run(path.parent) == runs.open_run(str(path)) == runs.Run(CONFIG, path)


def test_what_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such run folder or weights file"):
        runs.open_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in it \(looked in .*checkpoints\)"):
        runs.open_run(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a blip2 weights file"):
        runs.open_run(tmp_path / "other.safetensors")
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        runs.open_run(tmp_path / "text.txt")


def test_a_configuration_of_a_later_version_names_what_is_unknown(tmp_path: Path) -> None:
    values = to_dict(CONFIG)
    values["train"]["rockets"] = 3
    save_file({"x": torch.zeros(1)}, tmp_path / "new.safetensors", {"config": json.dumps(values)})
    with pytest.raises(ConfigError, match=r"new.safetensors: train: unknown setting 'rockets'; known: steps, batch"):
        runs.open_run(tmp_path / "new.safetensors")


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_configuration_survives_yaml(tmp_path: Path, name: str) -> None:
    config = replace(RECIPES[name](), init="runs/s1")
    runs.write_config(tmp_path, config)
    assert runs.read_config(tmp_path) == config
    assert runs.read_config(tmp_path / "config.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: -1}", "optim.lr is -1.0: it must be positive"),
        ("optim: {speed: 1}", "config.yaml: optim: unknown setting 'speed'; known: lr, min_lr"),
        ("stage: stage3", "stage is 'stage3': it must be one of stage1, stage2"),
        ("speed: 1", "config.yaml: unknown setting 'speed'"),
        ("train: {steps: many}", "config.yaml: .*steps"),
        ("train: 7", "config.yaml: train"),
        ("vision:", "config.yaml: vision"),
        ("a: [", "config.yaml: not valid YAML"),
        ("just text", "config.yaml: not a run configuration"),
        ("", "config.yaml: not a run configuration"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        runs.read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML reads 3e-4 as a text, for want of a dot."""
    (tmp_path / "config.yaml").write_text("optim: {lr: 3e-4, clip: 1e0, min_lr: 0}")
    config = runs.read_config(tmp_path)
    assert (config.optim.lr, config.optim.clip, config.optim.min_lr) == (3e-4, 1.0, 0)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.yaml: cannot be read: No such file or directory$"):
        runs.read_config(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config.yaml: cannot be read: "):
        runs.read_config(tmp_path)
