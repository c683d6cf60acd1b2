"""Training that starts from a checkpoint of each format, through the command line's own function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import blip2
from blip2.cli.main import main
from blip2.weights import runs
from blip2.weights.formats import open_checkpoint
from blip2.weights.lazy_tensors import read_safetensors

HF = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, color in enumerate(("red", "green", "blue", "black")):
        Image.new("RGB", (40, 40), color).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("two cats on the grass")
    return folder


@pytest.fixture(scope="module")
def stage1(hf: HF, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same stage 1 in the three formats."""
    folder = tmp_path_factory.mktemp("stage1")
    blip2.convert(hf("itm")[0], folder / "ours", "blip2")
    blip2.convert(folder / "ours", folder / "hf", "hf")
    blip2.convert(folder / "ours", folder / "lavis.pth", "lavis")
    return {"blip2": folder / "ours", "hf": folder / "hf", "lavis": folder / "lavis.pth"}


def command(stage: str, hf: HF, pictures: Path, out: Path, init: Path, *more: str) -> list[str]:
    itm, opt = str(hf("itm")[0]), str(hf("opt")[0])
    towers = ["--vision.name", itm, "--vision.image_size", "56", "--vision.pool", "1", "--qformer.init", itm]
    towers += ["--qformer.queries", "5", "--qformer.embed_dim", "16", "--language.name", opt]
    data = ["--data", str(pictures), "--data.dev", "null", "--data.cache_features", "false", "--data.workers", "0"]
    loop = ["--steps", "1", "--batch", "4", "--optim.warmup", "0", "--optim.lr", "1e-9", "--optim.min_lr", "0"]
    loop += ["--optim.warmup_lr", "0"]
    return ["train", f"tiny/{stage}", "--init", str(init), "--out", str(out), *towers, *data, *loop, *more]


@pytest.mark.parametrize("kind", ["blip2", "hf", "lavis"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_stage_starts_from_stage_1(
    stage: str, kind: str, hf: HF, stage1: dict[str, Path], pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    init = stage1[kind]
    code = main(command(stage, hf, pictures, tmp_path / "run", init))
    said = capsys.readouterr().err
    if kind == "lavis":  # this one brings its image encoder along
        assert code == 2
        assert "brings a fine-tuned image encoder: run `blip2 convert" in said
        return
    assert code == 0, said
    before = open_checkpoint(init).tensors
    after = read_safetensors(runs.checkpoints(tmp_path / "run")[-1][1] / runs.WEIGHTS)
    kept = [name for name in after if name in before]
    assert len(kept) == len(after) - (2 if stage == "stage2" else 0)
    for name in kept:  # a step at a learning rate of 1e-9
        torch.testing.assert_close(after[name], before[name].read(), atol=1e-6, rtol=0)
    if stage == "stage2":
        assert "start fresh (language_proj)" in said


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_sequences_of_pairs(
    language: str, hf: HF, stage1: dict[str, Path], pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    """Stage 2 with an example in front of every second pair, by a language model of either kind."""
    more = ["--language.name", str(hf(language)[0]), "--data.shots"]
    losses = {}
    for shots in ("0", "1"):
        out = tmp_path / shots
        assert main(command("stage2", hf, pictures, out, stage1["blip2"], *more, shots)) == 0, capsys.readouterr().err
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[shots] = next(line["loss"] for line in lines if line["kind"] == "train")
    assert losses["1"] != pytest.approx(losses["0"], rel=1e-4)
    assert main(command("stage2", hf, pictures, tmp_path / "3", stage1["blip2"], *more, "2")) == 2
    assert "train.batch is 4: it must be a multiple of" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_published_lavis_file_holds_no_encoder(
    stage: str, hf: HF, stage1: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    whole = torch.load(stage1["lavis"], weights_only=True)
    whole["model"] = {n: v for n, v in whole["model"].items() if not n.startswith("visual_encoder.")}
    torch.save(whole, tmp_path / "stage1.pth")
    assert main(command(stage, hf, pictures, tmp_path / "run", tmp_path / "stage1.pth")) == 0
    before = open_checkpoint(stage1["blip2"]).tensors
    after = read_safetensors(runs.checkpoints(tmp_path / "run")[-1][1] / runs.WEIGHTS)
    assert after.keys() - before.keys() == (
        {"language_proj.weight", "language_proj.bias"} if stage == "stage2" else set()
    )
    for name in after.keys() & before.keys():
        torch.testing.assert_close(after[name], before[name].read(), atol=1e-6, rtol=0)


def test_a_bare_qformer_starts_stage_1(hf: HF, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import Blip2QFormerModel

    torch.manual_seed(5)
    Blip2QFormerModel(hf("itm")[1].config.qformer_config).save_pretrained(tmp_path / "q")
    assert main(command("stage1", hf, pictures, tmp_path / "run", tmp_path / "q")) == 0
    said = capsys.readouterr().err
    before = open_checkpoint(tmp_path / "q").tensors
    after = read_safetensors(runs.checkpoints(tmp_path / "run")[-1][1] / runs.WEIGHTS)
    for name, lazy in before.items():
        torch.testing.assert_close(after[name], lazy.read(), atol=1e-6, rtol=0)
    fresh = {name for name in after if name not in before}
    assert {"temp", "qformer.query_tokens", "vision_proj.weight", "qformer.embeddings.word.weight"} <= fresh
    assert not any(name.startswith("qformer.layers.") for name in fresh)
    assert f"{len(before)} tensors from {tmp_path / 'q'}; {len(fresh)} start fresh" in said


def test_other_queries_are_adapted_and_another_width_is_refused(
    hf: HF, stage1: dict[str, Path], pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    from transformers import Dinov2Config, Dinov2Model

    more = ["--qformer.queries", "3"]
    assert main(command("stage2", hf, pictures, tmp_path / "run", stage1["hf"], *more)) == 0
    assert "5 queries in the checkpoint, 3 here: the first 3 are used" in capsys.readouterr().err
    sizes = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    Dinov2Model(Dinov2Config(image_size=56, patch_size=14, **sizes)).save_pretrained(tmp_path / "vit")
    capsys.readouterr()
    other = ["--vision.name", str(tmp_path / "vit")]
    assert main(command("stage2", hf, pictures, tmp_path / "other", stage1["hf"], *other)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"blip2: {stage1['hf']}: made for an image encoder 32 wide, this model's is 40 wide"


def test_stage_1_does_not_start_from_stage_2(hf: HF, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(command("stage1", hf, pictures, tmp_path / "run", hf("opt")[0])) == 2
    assert "is a stage-2 checkpoint: stage 1 starts from stage 1" in capsys.readouterr().err
