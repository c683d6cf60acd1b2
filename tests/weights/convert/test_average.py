"""The mean of runs: every tensor, any shares; runs of other models are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip2.cli.main import main
from blip2.configs import QFormerConfig, RunConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.weights import runs
from blip2.weights.convert.average import average
from blip2.weights.formats import open_checkpoint
from blip2.weights.lazy_tensors import lazily
from blip2.weights.loading import trained_state


def run(folder: Path, seed: int, queries: int = 3) -> Path:
    torch.manual_seed(seed)
    sizes = {"width": 8, "depth": 2, "heads": 2, "inner": 12, "image_width": 6, "vocab": 11, "positions": 9}
    model = Stage1(QFormer(**sizes, queries=queries), embed_dim=4)
    config = RunConfig(qformer=QFormerConfig(queries=queries, embed_dim=4), out=str(folder))
    folder.mkdir()
    runs.write_run(folder, lazily(trained_state(model)), config)
    return folder


@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ([3.0, 1.0], (0.75, 0.25))])
def test_every_tensor_is_the_mean(tmp_path: Path, weights: list[float] | None, shares: tuple[float, float]) -> None:
    one, other = run(tmp_path / "a", 0), run(tmp_path / "b", 1)
    mean = open_checkpoint(average([one, other], tmp_path / "mean", weights)).tensors
    first, second = open_checkpoint(one).tensors, open_checkpoint(other).tensors
    assert mean.keys() == first.keys()
    for name, lazy in mean.items():
        want = shares[0] * first[name].read() + shares[1] * second[name].read()
        torch.testing.assert_close(lazy.read(), want)
    assert not torch.equal(mean["qformer.query_tokens"].read(), first["qformer.query_tokens"].read())


def test_what_cannot_be_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = run(tmp_path / "a", 0), run(tmp_path / "more", 1, queries=4)
    with pytest.raises(CheckpointError, match="not of the same model as"):
        average([one, other], tmp_path / "mean")
    with pytest.raises(ConfigError, match="give two or more"):
        average([one], tmp_path / "mean")
    with pytest.raises(ConfigError, match="one for each"):
        average([one, one], tmp_path / "mean", [1.0])
    assert not (tmp_path / "mean").exists()
    assert main(["average", str(one), str(one), str(one)]) == 2  # the target is there already
    assert "exists already" in capsys.readouterr().err
    assert main(["average", str(tmp_path / "mean"), str(one), str(one), "--weights", "1", "2"]) == 0
