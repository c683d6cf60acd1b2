"""Checkpoints: exact round trips, what counts as whole, and what a user reads when one is not."""

from __future__ import annotations

import json
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from blip2.configs import OptimConfig
from blip2.errors import CheckpointError
from blip2.models.freezing import freeze
from blip2.training import checkpoint
from blip2.training.optim import build_optimizer
from blip2.weights import lazy_tensors
from blip2.weights.lazy_tensors import read_metadata, read_safetensors

NAMES = ["model.safetensors", "optimizer.safetensors", "state.json"]


class Model(nn.Module):
    """A part that trains, one that never gets a gradient, and a frozen tower."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(3, 3)
        self.bridge = nn.Linear(3, 2)
        self.unused = nn.Linear(2, 2)
        freeze(self.vision)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bridge(self.vision(x))


def trained(steps: int = 3, seed: int = 0) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model()
    optimizer = build_optimizer(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad), OptimConfig(lr=0.1, warmup=0)
    )
    for _ in range(steps):
        train_on(model, optimizer)
    return model, optimizer


def train_on(model: Model, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, step, *trained(), {"recipe": "custom"}, keep)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"a": 1}, 2)
    assert path == tmp_path / "checkpoints" / "step-000003"
    other, other_optimizer = trained(1, seed=5)
    other.vision.load_state_dict(model.vision.state_dict())
    assert checkpoint.load(path, other, other_optimizer) == 3
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert optimizer.state[a].keys() == other_optimizer.state[b].keys(), name
        assert all(torch.equal(value, other_optimizer.state[b][key]) for key, value in optimizer.state[a].items()), name
    for m, o in ((model, optimizer), (other, other_optimizer)):  # and so is the next step
        torch.manual_seed(9)
        train_on(m, o)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_it_can_be_loaded_before_the_first_step(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    model, optimizer = trained(0, seed=4)
    assert checkpoint.load(path, model, optimizer) == 3
    moments = {key for p in model.bridge.parameters() for key in optimizer.state[p]}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}
    assert not optimizer.state[model.unused.weight]


def test_nothing_is_pickled_and_frozen_towers_stay_out(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert sorted(p.name for p in path.iterdir()) == NAMES
    for name in NAMES[:2]:
        with safe_open(path / name, framework="pt") as handle:
            assert not any("vision" in key for key in handle.keys())  # noqa: SIM118 - not a dict
    assert json.loads((path / "state.json").read_text()) == {"step": 3}
    for file in path.iterdir():
        with pytest.raises(ValueError):  # noqa: PT011 - whatever pickletools says of it
            list(pickletools.genops(file.read_bytes()))
    assert json.loads(read_metadata(path / NAMES[0])["config"]) == {"recipe": "custom"}


def test_the_newest_whole_one_is_picked(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (9, 10, 100):
        save(tmp_path, step, keep=5)
    inside = tmp_path / "checkpoints"
    (inside / "step-000200").mkdir()  # without weights
    (inside / "step-abc").mkdir()
    half = inside / ".step-000300.tmp-1234"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == inside / "step-000100"


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-1000000"


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".step-000001.tmp-1"
    left.mkdir(parents=True)
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    model, optimizer = trained(5, seed=8)
    path = checkpoint.save(tmp_path, 3, model, optimizer, {}, 2)
    assert torch.equal(read_safetensors(path / "model.safetensors")["bridge.weight"], model.bridge.weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "gone"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 3)
    file = path / name
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\x80\x04" + b"x" * 50}[damage])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, *trained(0))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[3]", '{"step": null}'])
def test_a_state_without_step_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 3)
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.load(path, *trained(0))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    other, optimizer = trained(0)
    other.bridge = nn.Linear(3, 5)
    with pytest.raises(CheckpointError, match=r"bridge\.weight is \(2, 3\) in the checkpoint and \(5, 3\)"):
        checkpoint.load(path, other, optimizer)


def test_moments_of_a_frozen_part_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    other, optimizer = trained(0)
    freeze(other.bridge)
    with pytest.raises(CheckpointError, match="bridge.* does not train in this model"):
        checkpoint.load(path, other, optimizer)


@pytest.mark.parametrize("failing", NAMES[:2])
def test_a_full_disk_leaves_the_last_one_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = save(tmp_path, 3)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    replacing = lazy_tensors.replacing

    def full(target: Path, *, sync: bool) -> Any:
        if failing in target.name:
            target.write_bytes(b"as far as it went")
            raise OSError(28, "No space left on device", str(target))
        return replacing(target, sync=sync)

    monkeypatch.setattr(lazy_tensors, "replacing", full)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 4)
    message = str(caught.value)
    assert "step-000004: cannot write the checkpoint: No space left on device; step-000003 is intact" in message
    assert "\n" not in message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert checkpoint.load(path, *trained(0)) == 3


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"^.*step-000003: cannot write the checkpoint: Not a directory$"):
        save(tmp_path, 3)
