"""`blip2 estimate`: the paper's sizes, and bytes counted on meta against those of real training steps."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from blip2.apps import estimate as app
from blip2.apps.cli import main
from blip2.configs import LanguageConfig, QFormerConfig, RunConfig, TrainConfig, VisionConfig
from blip2.data.dataset import Batch
from blip2.errors import Blip2Error, ConfigError
from blip2.models.build import build_qformer
from blip2.models.language_model import language_model_from_config
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision_encoder import vision_encoder_from_config
from blip2.recipes import recipe
from blip2.training.objectives import Stage1Objective, Stage2Objective

TOKENS, B = 13, 16
FP32 = app.Machine(accelerator=False, autocast=False, frozen=torch.float32)
BF16 = app.Machine(accelerator=False, autocast=True, frozen=torch.float32)
GPU = app.Machine(accelerator=True, autocast=True, frozen=torch.bfloat16)

VISION = transformers.Dinov2Config(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
)
BERT = transformers.BertConfig(
    vocab_size=200, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
)
SMALL = {"vocab_size": 150, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE = {
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=48, dropout=0.1),
    "t5": transformers.T5Config(
        vocab_size=150, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}


class SameLengthTexts:
    """Tokenizer whose every text has `TOKENS` tokens, apart from a shorter first one in stage 2."""

    pad_id, dec_id = 0, 199

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        shape = len(texts), TOKENS
        return torch.randint(5, 150, shape), torch.ones(shape, dtype=torch.bool)

    def targets(self, prompts: list[str], captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = self(captions)
        mask[0, -1] = False
        labels = mask.clone()
        labels[:, : app.PROMPT_TOKENS] = False
        return ids, mask, labels

    def pairs(self, prefixes: list[str], suffixes: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*self.targets(prefixes, prefixes)[:2], *self.targets(suffixes, suffixes)[:2])


def small_config(folder: Path, stage: str, language: str = "llama") -> RunConfig:
    """A run whose towers are folders that hold nothing but a config."""
    for name, config in (("vision", VISION), ("bert", BERT), ("language", LANGUAGE[language])):
        config.save_pretrained(folder / name)
    return RunConfig(
        stage=stage,
        vision=VisionConfig(name=str(folder / "vision"), image_size=56, pool=2),
        qformer=QFormerConfig(init=str(folder / "bert"), queries=4, embed_dim=16),
        language=LanguageConfig(name=str(folder / "language")),
    )


def batch_of(features_BPC: Tensor) -> Batch:
    names = [str(n) for n in range(B)]
    return Batch(names, torch.arange(B), ["a caption of five words"] * B, features=features_BPC)


def real_bytes(config: RunConfig, language: str, bf16: bool) -> int:
    """Bytes saved by a real step of the real objective, on random weights and features."""
    encoder = vision_encoder_from_config(VISION, pool=config.vision.pool, size=config.vision.image_size)
    qformer = build_qformer(config.qformer, encoder.width, BERT, text=config.stage == "stage1")
    objective: nn.Module
    if config.stage == "stage1":
        objective = Stage1Objective(Stage1(qformer, embed_dim=16), SameLengthTexts(), config.loss)  # type: ignore[arg-type]
    else:
        model = Stage2(qformer, language_model_from_config(LANGUAGE[language]))
        objective = Stage2Objective(model, SameLengthTexts(), config.language)  # type: ignore[arg-type]
    objective.train()
    batch = batch_of(torch.randn(B, encoder.tokens, encoder.width))
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        return app.saved_bytes(objective, lambda: objective(batch, 0))


@pytest.mark.parametrize("machine", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "language"), [("stage1", "llama"), ("stage2", "llama"), ("stage2", "opt"), ("stage2", "t5")]
)
def test_meta_counts_what_a_real_step_keeps(tmp_path: Path, stage: str, language: str, machine: app.Machine) -> None:
    config = small_config(tmp_path, stage, language)
    counted = app.activation_bytes(app.build_on_meta(config), config, B, machine, text_tokens=TOKENS)
    assert counted == pytest.approx(real_bytes(config, language, machine.autocast), rel=0.05)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_an_accelerator_keeps_less_than_a_cpu_in_fp32(tmp_path: Path, stage: str) -> None:
    config = small_config(tmp_path, stage)
    gpu, cpu = (app.activation_bytes(app.build_on_meta(config), config, B, m) for m in (GPU, FP32))
    assert 0.4 < gpu / cpu < 1


def test_saved_bytes_by_hand() -> None:
    weight = nn.Linear(3, 5)
    x = torch.randn(2, 3, requires_grad=True)

    def forward() -> Tensor:
        y = weight(x)  # keeps x [2, 3] and its own weight, which is not counted
        return (y.exp() * y).view(10)[:4].square()  # exp keeps its result; * both; square the sliced product

    assert app.saved_bytes(weight, forward) == 4 * (6 + 10 + 10 + 10)


def test_kernels_by_hand() -> None:
    def bytes_of(machine: app.Machine, forward: Any) -> int:
        with app.DeviceKernels(machine):
            return app.saved_bytes(nn.Identity(), forward)

    q = torch.empty(2, 4, 16, 8, device="meta", requires_grad=True)
    k = torch.empty(2, 4, 32, 8, device="meta", requires_grad=True)
    inputs, result, rows = 1024 + 2048 + 2048, 1024, 2 * 4 * 16
    v = torch.empty_like(k, requires_grad=True)
    attend = F.scaled_dot_product_attention
    assert bytes_of(FP32, lambda: attend(q, k, v)) == 4 * (inputs + result + rows)
    assert bytes_of(GPU, lambda: attend(q, k, v, dropout_p=0.1)) == 2 * (inputs + result) + 4 * rows
    assert bytes_of(FP32, lambda: attend(q, k, v, dropout_p=0.1)) > 4 * 2 * 4 * 16 * 32
    assert bytes_of(FP32, lambda: F.dropout(q, 0.1)) == 4 * 1024
    assert bytes_of(GPU, lambda: F.dropout(q, 0.1)) == 1024


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("vitg-opt2.7b/stage1", 186.7e6, 188e6),
        ("vitg-opt2.7b/stage2", 103e6, 108e6),
        ("vitg-flant5xl/stage2", 103e6, 108e6),
    ],
)
def test_paper_sizes(name: str, low: float, high: float) -> None:
    numbers = app.measure(recipe(name), accelerator=True)
    parts = {row["part"]: row for row in numbers["parameters"]}
    assert parts["vision"] == {"part": "vision", "trained": 0, "frozen": pytest.approx(986e6, rel=0.001)}
    assert low <= numbers["trained"] <= high
    assert numbers["trained"] == sum(row["trained"] for row in numbers["parameters"])
    assert numbers["frozen"] == sum(row["frozen"] for row in numbers["parameters"])


def test_memory_adds_up(tmp_path: Path) -> None:
    config = replace(small_config(tmp_path, "stage1"), train=TrainConfig(batch=48, accumulate=2))
    gpu, cpu = app.measure(config, accelerator=True), app.measure(config, accelerator=False)
    assert [row["batch"] for row in gpu["memory"]] == [1, 8, 16, 24, 32, 64, 128]
    weights = 16 * gpu["trained"] + 2 * gpu["frozen"]
    for row in gpu["memory"]:
        assert row["weights_gb"] == pytest.approx(weights / 1e9, abs=1e-3)
        assert row["total_gb"] == pytest.approx(row["weights_gb"] + row["activations_gb"], abs=2e-3)
    kept = [row["activations_gb"] for row in cpu["memory"]]
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(2 * kept[-2], rel=0.1)
    assert cpu["assumptions"]["device"] == "cpu"
    assert gpu["assumptions"]["bytes_per_frozen_parameter"] == 2


def test_device_follows_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, "stage1")
    devices = {
        device: app.measure(replace(config, train=TrainConfig(device=device)))["assumptions"]["device"]
        for device in ("auto", "cpu", "cuda")
    }
    auto = "accelerator" if torch.cuda.is_available() else "cpu"
    assert devices == {"auto": auto, "cpu": "cpu", "cuda": "accelerator"}


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "tiny/stage1", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) == {"recipe", "stage", "parameters", "trained", "frozen", "memory", "assumptions"}
    assert main(["estimate", "tiny/stage1"]) == 0
    text = capsys.readouterr().out
    assert f"{numbers['trained']:,}" in text
    assert f"{numbers['frozen']:,}" in text
    assert "batch 64 (recipe)" in text
    assert all(f"{row['total_gb']:.2f}" in text for row in numbers["memory"])


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("vision.name", {"vision": VisionConfig(name="someone/some-vit")}),
        ("qformer.init", {"qformer": QFormerConfig(init="someone/some-bert")}),
        ("language.name", {"language": LanguageConfig(name="someone/some-lm")}),
        ("vision.name", {"vision": VisionConfig(name="opt-2.7b")}),
        ("qformer.init", {"qformer": QFormerConfig(init="BERT-FOLDER")}),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path: Path, setting: str, change: dict[str, Any]) -> None:
    config = small_config(tmp_path, "stage2")
    if setting == "qformer.init" and change["qformer"].init == "BERT-FOLDER":
        change = {"qformer": QFormerConfig(init=str(tmp_path / "language"))}
    with pytest.raises(ConfigError) as caught:
        app.estimate(replace(config, **change))
    assert isinstance(caught.value, Blip2Error)
    assert str(caught.value).startswith(f"{setting} is ")
    assert "\n" not in str(caught.value)
