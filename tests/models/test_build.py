"""From a configuration to a model: sizes from the BERT-type folder, seeded, started or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2Model, LlamaConfig

from blip2.configs import LoraConfig, LossConfig, QFormerConfig, RunConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.models import build as builder
from blip2.models.freezing import is_adapter
from blip2.models.language.model import language_model_from_config

BERT = BertConfig(
    vocab_size=17, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=10, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    BertForMaskedLM(BERT).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig(qformer=QFormerConfig(init=str(folder), queries=4, embed_dim=6), **changes)


def vision(width: int = 6) -> Any:
    encoder = torch.nn.Linear(3, width)
    encoder.width = width  # type: ignore[assignment]
    return encoder


def test_stage_1_has_the_sizes_of_config_and_checkpoint(folder: Path) -> None:
    model = builder.build_stage1(config(folder, loss=LossConfig(temperature=0.05)), vision(6))
    assert model.qformer.query_tokens.shape == (4, 16)
    assert model.qformer.embeddings.word.num_embeddings == 17 + 1
    assert (model.qformer.depth, model.qformer.image_width) == (2, 6)
    assert model.vision_proj.out_features == 6
    assert model.temp.tolist() == pytest.approx([0.05])


def test_the_q_former_starts_from_the_checkpoint_or_not(folder: Path) -> None:
    words = BertForMaskedLM.from_pretrained(folder).bert.embeddings.word_embeddings.weight
    started = builder.build_stage1(config(folder), vision())
    fresh = builder.build_stage1(config(folder), vision(), start=False)
    assert torch.equal(started.qformer.embeddings.word.weight[:17], words)
    assert fresh.qformer.embeddings.word.weight.std() < 0.05


def test_a_checkpoint_without_prediction_head_will_do(tmp_path: Path) -> None:
    """transformers fills in a random head with a warning: it must not be taken for the checkpoint's."""
    BertModel(BERT).save_pretrained(tmp_path)
    torch.manual_seed(3)
    model = builder.build_stage1(config(tmp_path), vision())
    assert not model.qformer.head.bias.any()
    assert torch.equal(model.qformer.head.norm.weight, torch.ones(16))
    assert model.qformer.head.dense.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_stage_2_has_no_text_branch(folder: Path) -> None:
    llama = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    model = builder.build_stage2(config(folder, stage="stage2"), vision(), language_model_from_config(llama))
    assert model.qformer.embeddings is None
    assert model.language_proj.out_features == 8


def test_stage_2_has_the_adapters_that_its_configuration_names(folder: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    llama = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    run = config(folder, stage="stage2", lora=LoraConfig(rank=2, targets="o_proj"))
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(builder.build_stage2(run, vision(), language_model_from_config(llama)))
    ours, again = ({n: p for n, p in m.language_model.named_parameters() if is_adapter(n)} for m in models)
    assert list(ours) == [f"model.model.layers.0.self_attn.o_proj.lora_{x}.default.weight" for x in "AB"]
    assert all(torch.equal(p, again[n]) for n, p in ours.items())


def test_initialisation_is_seeded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "load_vision_encoder", lambda _: vision())
    base = config(folder)
    other = replace(base, train=replace(base.train, seed=1))
    first, second, third = (builder.build(c).qformer.query_tokens for c in (base, base, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a gpt2 checkpoint; the Q-Former starts from a BERT-type one"):
        builder.build_stage1(config(tmp_path), vision())


def test_text_decides_the_vocabulary() -> None:
    bert = SimpleNamespace(**BERT.to_dict())
    assert builder.build_qformer(QFormerConfig(), 6, bert, text=False).head is None
    assert builder.build_qformer(QFormerConfig(), 6, bert, text=True).head.bias.shape == (18,)


def test_heads_that_do_not_divide_the_width_are_named() -> None:
    bert = BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=5)
    with pytest.raises(ConfigError, match="^qformer.init is 'minilm-l6': 24 wide, which 5 heads do not divide$"):
        builder.build_qformer(QFormerConfig(), 6, bert, text=False)
