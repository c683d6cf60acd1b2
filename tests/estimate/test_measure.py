"""`blip2 estimate`: the paper's sizes, sums that add up, and what it says of models it cannot read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from blip2.cli.main import main
from blip2.configs import (
    LanguageConfig,
    LoraConfig,
    OptimConfig,
    QFormerConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
    to_dict,
)
from blip2.errors import ConfigError
from blip2.estimate import measure as app
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


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on the memory of a step, which takes seconds to count."""
    monkeypatch.setattr(app, "step_curve", lambda *_: lambda batch: batch * 10**6)


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
    assert gpu["assumptions"]["workspace"] == gpu["assumptions"]["buffers_gb"] == 0
    assert cpu["assumptions"]["buffers_gb"] == app.CPU_BUFFERS / 1e9
    for row in cpu["memory"]:
        held = row["activations_gb"] + 4e-9 * cpu["trained"]
        assert row["workspace_gb"] == pytest.approx(app.CPU_KEPT * held + app.CPU_BUFFERS / 1e9, abs=2e-3)
        parts = row["weights_gb"] + row["activations_gb"] + row["workspace_gb"]
        assert row["total_gb"] == pytest.approx(parts, abs=2e-3)
    activations = [row["activations_gb"] for row in cpu["memory"]]
    assert activations == sorted(activations)
    assert activations[-1] == pytest.approx(2 * activations[-2], rel=0.2)


def test_adapters_train(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    config = run_of_folders(tmp_path, "stage2")
    plain, lora = (app.measure(c, accelerator=True) for c in (config, replace(config, lora=LoraConfig(rank=4))))
    rows = [{row["part"]: row for row in numbers["parameters"]}["language_model"] for numbers in (plain, lora)]
    more = 2 * 2 * 4 * (48 + 48)  # query and value of two blocks, two matrices of rank 4
    assert (rows[0]["trained"], rows[1]["trained"]) == (0, more)
    assert rows[0]["frozen"] == rows[1]["frozen"]
    assert lora["trained"] == plain["trained"] + more
    wider = [b["activations_gb"] - a["activations_gb"] for a, b in zip(plain["memory"], lora["memory"], strict=True)]
    assert wider[-1] > 0


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize(("kind", "per_weight"), [("int8", 1.0), ("nf4", 0.5625)])
@pytest.mark.parametrize("rank", [0, 4])
def test_quantized_weights_count_what_they_take(tmp_path: Path, kind: str, per_weight: float, rank: int) -> None:
    """Large enough to be seen in numbers rounded to MB; the scales of int8 are too small for that."""
    if rank:
        pytest.importorskip("peft", reason="peft is not installed")
    base = run_of_folders(tmp_path, "stage2")
    sizes = {"hidden_size": 1600, "intermediate_size": 3200, "num_hidden_layers": 4, "num_attention_heads": 8}
    transformers.LlamaConfig(vocab_size=150, **sizes).save_pretrained(tmp_path / "language")
    base = replace(base, lora=LoraConfig(rank=rank, targets="all-linear"))
    packed = 4 * (4 * 1600 * 1600 + 3 * 1600 * 3200)
    plain = app.measure(base, accelerator=True)
    numbers = app.measure(replace(base, language=replace(base.language, quantize=kind)), accelerator=True)
    assert numbers["assumptions"]["quantized"]["parameters"] == packed
    assert numbers["frozen"] == plain["frozen"]
    saved = plain["memory"][0]["weights_gb"] - numbers["memory"][0]["weights_gb"]
    assert saved == pytest.approx(packed * (2 - per_weight) / 1e9, abs=2e-3)


def test_the_largest_micro_batch_is_the_largest_that_fits() -> None:
    def activations(batch: int) -> int:
        return 3 * batch * batch + 10**8 * batch

    for weights in (0, 14 * 10**9, 14_299_999_997):
        batch = app._fit(16, None, {None: weights}, activations)["micro_batch"]
        assert weights + activations(batch) <= 0.9 * 16e9 < weights + activations(batch + 1)
    assert app._fit(16, None, {None: 14_299_999_998}, activations)["micro_batch"] == 0


@pytest.mark.parametrize(
    ("quantize", "weights", "advice"),
    [
        (None, {None: 20, "int8": 12, "nf4": 8}, "try --language.quantize int8"),
        (None, {None: 50, "int8": 30, "nf4": 14}, "try --language.quantize nf4"),
        ("int8", {None: 50, "int8": 30, "nf4": 14}, "try --language.quantize nf4"),
        (None, {None: 50, "int8": 30, "nf4": 20}, "try 4 cards and --train.parallel fsdp2"),
        (
            "nf4",
            {None: 50, "int8": 30, "nf4": 20},
            "try 4 cards and --train.parallel fsdp2, without --language.quantize",
        ),
        (None, {None: 20}, "try 2 cards and --train.parallel fsdp2"),
        (None, {None: 500}, "take smaller models"),
    ],
)
def test_what_does_not_fit_gets_advice_that_helps(
    quantize: str | None, weights: dict[str | None, int], advice: str
) -> None:
    """On a card of 16 GB, of which 14.4 are used; GB of weights, and 0.1 GB of activations a pair."""
    sizes = {kind: size * 10**9 for kind, size in weights.items()}
    fit = app._fit(16, quantize, sizes, lambda batch: batch * 10**8)
    assert fit == {"micro_batch": 0, "advice": advice}


@pytest.mark.slow
def test_larger_cards_fit_more_and_advice_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "vitg-flant5xl/stage2", "--language.name", "flan-t5-xxl", "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert [fit["card_gb"] for fit in fits] == [16, 24, 40, 80]
    assert fits[0] == {"card_gb": 16, "micro_batch": 0, "advice": "try --language.quantize nf4"}
    assert 0 < fits[2]["micro_batch"] < fits[3]["micro_batch"]


def test_settings_that_change_memory_are_counted_and_said(tmp_path: Path) -> None:
    base = run_of_folders(tmp_path, "stage2")
    config = replace(
        base,
        vision=replace(base.vision, token_drop=0.5),
        data=replace(base.data, texts_per_image=3),
        optim=OptimConfig(name="sgd"),
        train=TrainConfig(batch=16, checkpoint=True, head_chunk=32),
    )
    plain, saving = (app.measure(c, accelerator=True) for c in (base, config))
    assert plain["assumptions"]["bytes_per_trained_parameter"] == {"weight": 4, "gradient": 4, "optimizer": 8}
    assert saving["assumptions"]["bytes_per_trained_parameter"]["optimizer"] == 4
    text = " ".join(app._text(saving).split())
    for said in (
        "12 bytes per trained parameter",
        "4 of sgd",
        "3 of them per image",
        "50% of the patches dropped",
        "computed again",
        "32 rows of logits",
    ):
        assert said in text


@pytest.mark.usefixtures("no_step")
def test_device_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def device(wanted: str) -> str:
        numbers = app.measure(replace(config, train=TrainConfig(device=wanted)))
        return str(numbers["assumptions"]["device"])

    config = run_of_folders(tmp_path, "stage1")
    assert (device("cpu"), device("cuda")) == ("cpu", "accelerator")
    assert device("auto") == ("accelerator" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(app, "CPU_LIMIT", 1000)
    assert (device("cpu"), device("auto")) == ("cpu", "accelerator")


@pytest.mark.parametrize("given", ["a run's file", pytest.param("tiny/stage2", marks=pytest.mark.slow)])
def test_command_prints_the_same_numbers_twice(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if given == "a run's file":
        given = str(tmp_path / "config.yaml")
        Path(given).write_text(yaml.safe_dump(to_dict(run_of_folders(tmp_path, "stage2"))))
    assert main(["estimate", given, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    parts = {"recipe", "stage", "parameters", "trained", "frozen", "memory", "fits", "assumptions"}
    assert set(numbers) == parts
    assert main(["estimate", given]) == 0
    text = capsys.readouterr().out
    assert f"{numbers['trained']:,}" in text
    assert f"{numbers['frozen']:,}" in text
    assert f"batch {numbers['assumptions']['recipe_batch']} (recipe)" in text
    assert all(f"{row['total_gb']:.2f}" in text for row in numbers["memory"])
    assert all(f"{fit['card_gb']:>4} GB  {fit['micro_batch']:,}\n" in text for fit in numbers["fits"])


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
