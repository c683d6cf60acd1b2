"""`blip2 estimate`: the paper's sizes, sums that add up, and what it says of models it cannot read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from blip2.apps import estimate as app
from blip2.apps.cli import main
from blip2.configs import LanguageConfig, QFormerConfig, RunConfig, TrainConfig, VisionConfig
from blip2.errors import ConfigError
from blip2.models.freezing import parameter_table
from blip2.recipes import recipe

CONFIGS: dict[str, Any] = {
    "vision": transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    ),
    "bert": transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    ),
    "language": transformers.LlamaConfig(
        vocab_size=150, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ),
}


def run_of_folders(folder: Path, stage: str) -> RunConfig:
    """A run whose towers are folders that hold nothing but a config."""
    for name, config in CONFIGS.items():
        config.save_pretrained(folder / name)
    return RunConfig(
        stage=stage,
        vision=VisionConfig(name=str(folder / "vision"), image_size=56, pool=2),
        qformer=QFormerConfig(init=str(folder / "bert"), queries=4, embed_dim=16),
        language=LanguageConfig(name=str(folder / "language")),
    )


@pytest.mark.parametrize(
    ("name", "low", "high", "language"),
    [
        ("vitg-opt2.7b/stage1", 186.7e6, 188e6, None),
        ("vitg-opt2.7b/stage2", 103e6, 108e6, 2.65e9),
        ("vitg-flant5xl/stage2", 103e6, 108e6, 2.85e9),
    ],
)
def test_paper_sizes(name: str, low: float, high: float, language: float | None) -> None:
    model = app.build_on_meta(recipe(name))
    rows = {row.name: row for row in parameter_table(model)}
    assert all(p.is_meta for p in model.parameters())
    assert low <= sum(row.trainable for row in rows.values()) <= high
    assert (rows["vision"].trainable, rows["vision"].frozen) == (0, pytest.approx(986e6, rel=0.001))
    if language is not None:
        assert rows["language_model"].frozen == pytest.approx(language, rel=0.001)
        assert rows["language_model"].trainable == 0


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_numbers_add_up(tmp_path: Path, stage: str) -> None:
    config = replace(run_of_folders(tmp_path, stage), train=TrainConfig(batch=48, accumulate=2))
    gpu, cpu = app.measure(config, accelerator=True), app.measure(config, accelerator=False)
    assert gpu["trained"] == sum(row["trained"] for row in gpu["parameters"]) > 0
    assert gpu["frozen"] == sum(row["frozen"] for row in gpu["parameters"]) > 0
    assert [row["batch"] for row in gpu["memory"]] == [1, 8, 16, 24, 32, 64, 128]
    weights = 16 * gpu["trained"] + 2 * gpu["frozen"]
    assert gpu["assumptions"]["bytes_per_frozen_parameter"] == 2
    for row in gpu["memory"]:
        assert row["weights_gb"] == pytest.approx(weights / 1e9, abs=6e-4)
        assert row["total_gb"] == pytest.approx(row["weights_gb"] + row["activations_gb"], abs=2e-3)
    activations = [row["activations_gb"] for row in cpu["memory"]]
    assert activations == sorted(activations)
    assert activations[-1] == pytest.approx(2 * activations[-2], rel=0.2)


def test_device_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def device(wanted: str) -> str:
        numbers = app.measure(replace(config, train=TrainConfig(device=wanted)))
        return str(numbers["assumptions"]["device"])

    config = run_of_folders(tmp_path, "stage1")
    assert (device("cpu"), device("cuda")) == ("cpu", "accelerator")
    assert device("auto") == ("accelerator" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(app, "CPU_LIMIT", 1000)
    assert (device("cpu"), device("auto")) == ("cpu", "accelerator")


def test_command_prints_the_same_numbers_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "tiny/stage2", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers) == {"recipe", "stage", "parameters", "trained", "frozen", "memory", "assumptions"}
    assert main(["estimate", "tiny/stage2"]) == 0
    text = capsys.readouterr().out
    assert f"{numbers['trained']:,}" in text
    assert f"{numbers['frozen']:,}" in text
    assert "batch 64 (recipe)" in text
    assert all(f"{row['total_gb']:.2f}" in text for row in numbers["memory"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"vision": VisionConfig(name="someone/vit")}, r"vision\.name is 'someone/vit': its config cannot be read"),
        ({"qformer": QFormerConfig(init="someone/bert")}, r"qformer\.init is 'someone/bert': its config cannot be"),
        ({"language": LanguageConfig(name="someone/lm")}, r"language\.name is 'someone/lm': its config cannot be"),
        ({"vision": VisionConfig(name="opt-2.7b")}, r"vision\.name is 'opt-2.7b': that is a language model, not"),
        ({"qformer": QFormerConfig(init="LANGUAGE")}, r"qformer\.init is '.*language': a llama checkpoint, not"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    config = run_of_folders(tmp_path, "stage2")
    if line.endswith("a llama checkpoint, not"):
        change = {"qformer": QFormerConfig(init=str(tmp_path / "language"))}
    with pytest.raises(ConfigError, match=line) as caught:
        app.estimate(replace(config, **change))
    assert "\n" not in str(caught.value)
