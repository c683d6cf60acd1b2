"""LoRA and quantized language models from training to export, on random towers."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import blip2
from blip2.cli.main import main
from blip2.errors import CheckpointError
from blip2.inference import Blip2
from blip2.models.freezing import is_adapter
from blip2.weights import runs
from blip2.weights.formats import open_checkpoint

pytest.importorskip("peft", reason="peft is not installed")

HF = Callable[[str], tuple[Path, Any]]
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, color in enumerate(("red", "green", "blue", "black")):
        Image.new("RGB", (40, 40), color).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("two cats on the grass")
    return folder


def train(hf: HF, kind: str, pictures: Path, out: Path, *more: str) -> int:
    """Two steps of stage 2 from a transformers checkpoint, its towers included."""
    name = str(hf(kind)[0])
    towers = ["--vision.name", name, "--vision.image_size", "56", "--vision.pool", "1", "--qformer.init", name]
    towers += ["--qformer.queries", "5", "--qformer.embed_dim", "16", "--language.name", name]
    data = ["--data", str(pictures), "--data.dev", "null", "--data.cache_features", "false", "--data.workers", "0"]
    loop = ["--steps", "2", "--batch", "4", "--optim.warmup", "0", "--optim.lr", "0.05"]
    return main(["train", "tiny/stage2", "--init", name, "--out", str(out), *towers, *data, *loop, *more])


@pytest.fixture(scope="module")
def adapted(hf: HF, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`adapted(kind)`: a run with adapters, trained for two steps."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("runs") / kind
            targets = "q_proj,fc1" if kind == "opt" else "q,wi_0"
            more = ("--lora.rank", "2", "--lora.targets", targets, "--lora.dropout", "0.1")
            assert train(hf, kind, pictures, made[kind], *more) == 0
        return made[kind]

    return build


def loss(model: Blip2) -> Tensor:
    assert model.stage2 is not None
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    language_model, ids = model.stage2.language_model, torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        prompts = model.stage2.soft_prompts(model.features([picture]))
        if language_model.encoder_decoder:
            return language_model.encoder_decoder_loss(prompts, ids, ids > 0, ids, ids > 0)
        return language_model.decoder_loss(prompts, ids, ids > 0, ids > 0)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_adapters_are_merged_on_export_to_transformers(
    hf: HF, adapted: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    from transformers import Blip2ForConditionalGeneration

    done = blip2.convert(adapted(kind), tmp_path / "hf", "hf")
    assert "LoRA adapters are merged into the language model" in done.notes
    _, report = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours, written = (blip2.load(folder, dtype="fp32") for folder in (adapted(kind), tmp_path / "hf"))
    assert (ours.config.lora.rank, written.config.lora.rank) == (2, 0)
    torch.testing.assert_close(loss(written), loss(ours), rtol=1e-5, atol=0)
    assert ours.stage2 is not None
    with torch.no_grad():
        for name, p in ours.stage2.named_parameters():
            if "lora_B" in name:
                p.zero_()
    assert (loss(ours) - loss(written)).abs() > 1e-3  # the adapters had learned something


def test_adapters_stay_as_they_are_in_a_run_of_ours_and_lavis_refuses_them(
    adapted: Callable[[str], Path], tmp_path: Path
) -> None:
    blip2.convert(adapted("opt"), tmp_path / "copy", "blip2")
    before, after = open_checkpoint(adapted("opt")).tensors, open_checkpoint(tmp_path / "copy").tensors
    assert sum(map(is_adapter, before)) == 2 * 2 * 2
    assert before.keys() == after.keys()
    assert torch.equal(
        loss(blip2.load(tmp_path / "copy", dtype="fp32")), loss(blip2.load(adapted("opt"), dtype="fp32"))
    )
    with pytest.raises(CheckpointError, match="LAVIS files hold no language model, so its LoRA adapters have no place"):
        blip2.convert(adapted("opt"), tmp_path / "run.pth", "lavis")
    assert not (tmp_path / "run.pth").exists()


def test_a_run_says_what_trained_and_where_it_came_from(hf: HF, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(hf, "opt", pictures, tmp_path / "run", "--lora.rank", "2") == 0
    said = capsys.readouterr().err
    assert "8 start fresh (LoRA adapters)" in said
    rows = {row["name"]: row for row in json.loads((tmp_path / "run/summary.json").read_text())["parameters"]}
    assert rows["language_model"]["trainable"] == 2 * 2 * 2 * (20 + 20)  # two blocks, q and v, rank 2
    weights = runs.checkpoints(tmp_path / "run")[-1][1] / runs.WEIGHTS
    assert sum(name.startswith("language_model.") for name in open_checkpoint(weights).tensors) == 8
    again = ("--init", str(tmp_path / "run"))
    assert train(hf, "opt", pictures, tmp_path / "other", *again) == 2
    assert "has no place in this model: give lora.rank and lora.targets of its run" in capsys.readouterr().err
    assert train(hf, "opt", pictures, tmp_path / "wider", *again, "--lora.rank", "3") == 2
    assert "use the same lora.rank" in capsys.readouterr().err


@needs_torchao
def test_adapters_trained_on_quantized_weights(
    hf: HF, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ("--lora.rank", "2", "--language.quantize", "int8")
    assert train(hf, "opt", pictures, run, *more) == 0
    quantized, plain = blip2.load(run, dtype="fp32"), blip2.load(run, dtype="fp32", quantize="none")
    assert (quantized.config.language.quantize, plain.config.language.quantize) == ("int8", None)
    assert not torch.equal(loss(quantized), loss(plain))
    torch.testing.assert_close(loss(quantized), loss(plain), rtol=0.05, atol=0)
    blip2.convert(run, tmp_path / "hf", "hf")
    written = blip2.load(tmp_path / "hf", dtype="fp32")
    assert written.config.language.quantize is None
    torch.testing.assert_close(loss(written), loss(plain), rtol=1e-5, atol=0)
    capsys.readouterr()
    picture = str(pictures / "0.png")
    assert main(["caption", picture, "--model", str(hf("opt")[0]), "--quantize", "int8", "--beams", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{picture}: ")


@needs_torchao
def test_stage_1_has_nothing_to_quantize(hf: HF, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", str(pictures / "0.png"), "--model", str(hf("itm")[0]), "--quantize", "int8"]) == 2
    assert "language.quantize is 'int8': it must be null in stage 1" in capsys.readouterr().err
