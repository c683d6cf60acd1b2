"""Slim files: kept words are the run's, the others those of the checkpoint that it started from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from blip2.configs import LanguageConfig, QFormerConfig, RunConfig, VisionConfig, to_dict
from blip2.errors import CheckpointError
from blip2.models.build import bert_config, build_qformer, load_qformer
from blip2.models.stage1 import Stage1
from blip2.weights import compact, runs
from blip2.weights.convert.pipeline import convert
from blip2.weights.formats import located, open_checkpoint
from blip2.weights.lazy_tensors import LazyTensor, lazily, open_safetensors
from blip2.weights.loading import trained_state

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "runs", "zebra"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, bert: Path) -> Path:
    """A stage-1 run whose every weight training has moved."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = RunConfig(
        vision=VisionConfig(name="dinov2-s"),
        qformer=QFormerConfig(init=str(bert), queries=3, embed_dim=4),
        language=LanguageConfig(),
        init="runs/before",
    )
    qformer = build_qformer(config.qformer, 6, bert_config(str(bert)), text=True)
    model = Stage1(qformer, embed_dim=4)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    runs.write_run(folder, lazily(trained_state(model)), config)
    return folder


def test_words_that_recur_are_kept_and_the_rest_is_berts(run: Path, bert: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "one.png", "captions": ["a dog runs", "a dog", "a zebra runs"]}))
    convert(run, tmp_path / "slim", "slim", words=str(data))
    before, after = open_checkpoint(run), open_checkpoint(tmp_path / "slim")
    assert before.tensors.keys() == after.tensors.keys()
    words = after.tensors[compact.WORDS].read()
    own = before.tensors[compact.WORDS].read().to(torch.bfloat16).float()
    kept = [WORDS.index(word) for word in ("[CLS]", "[SEP]", "a", "dog", "runs")] + [len(WORDS)]  # the last is [DEC]
    assert torch.equal(words[kept], own[kept])
    left = [WORDS.index(word) for word in ("cat", "zebra", "[MASK]")]
    theirs = BertModel.from_pretrained(bert, add_pooling_layer=False).embeddings.word_embeddings.weight
    assert torch.equal(words[left], theirs[left])
    assert not torch.equal(words[left], own[left])
    assert torch.equal(after.tensors["temp"].read(), before.tensors["temp"].read())  # exact
    assert after.config.init == "before"
    stored = open_safetensors(tmp_path / "slim" / runs.WEIGHTS)
    assert stored[compact.VALUES].shape == (len(kept), 8)
    assert {lazy.dtype for name, lazy in stored.items() if name not in ("temp", compact.ROWS)} == {torch.bfloat16}


def test_all_words_that_moved_without_a_data_set(run: Path, bert: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "slim", "slim", stage1="first")
    checkpoint = open_checkpoint(tmp_path / "slim")
    own = open_checkpoint(run).tensors[compact.WORDS].read().to(torch.bfloat16).float()
    assert torch.equal(checkpoint.tensors[compact.WORDS].read(), own)
    assert checkpoint.config.init == "first"


def test_words_that_did_not_move_are_left_out_exactly(run: Path, bert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(run)
    words = checkpoint.tensors[compact.WORDS].read().clone()
    words[:-1] = BertModel.from_pretrained(bert, add_pooling_layer=False).embeddings.word_embeddings.weight.detach()
    words[6] += 1.0
    checkpoint.tensors[compact.WORDS] = checkpoint.tensors[compact.WORDS].of(words)
    small = compact.shrink(checkpoint, None)
    assert small[compact.ROWS].read().tolist() == [6, len(WORDS)]
    whole = compact.restore(small, checkpoint.config.qformer, "run")[compact.WORDS].read()
    assert torch.equal(whole[:6], words[:6])  # in full precision: they are BERT's own


def test_rows_that_the_vocabulary_does_not_have(run: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(run)
    tensors = compact.shrink(checkpoint, torch.tensor([5]))
    tensors[compact.ROWS] = tensors[compact.ROWS].of(torch.tensor([5, 99], dtype=torch.int32))
    folder = tmp_path / "bad"
    folder.mkdir()
    runs.write_weights(folder / runs.WEIGHTS, tensors, to_dict(checkpoint.config))
    with pytest.raises(CheckpointError, match="do not fit the 11 words"):
        open_checkpoint(folder)


def test_a_folder_of_the_name_of_a_preset_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(located("tiny")).name == "stage2"
    (tmp_path / "tiny").mkdir()
    assert located("tiny") == "tiny"


def test_a_text_branch_that_was_not_trained_is_left_out_and_comes_back(run: Path, bert: Path, tmp_path: Path) -> None:
    """Of a locked run, but for a layer that came trained from elsewhere."""
    checkpoint = open_checkpoint(run)
    qformer = replace(checkpoint.config.qformer, lock_text=True, text_pool="mean")
    fresh = load_qformer(qformer, 6, text=True)
    states = {f"qformer.{name}": p.detach() for name, p in fresh.named_parameters()}
    trained = "qformer.layers.1.text_ff.up.weight"
    moved = states[trained] + 1
    for name, value in (states | {trained: moved}).items():
        if ".query_ff." not in name and ".cross_attention." not in name and "query_tokens" not in name:
            checkpoint.tensors[name] = LazyTensor.of(value)
    locked = replace(checkpoint, config=replace(checkpoint.config, qformer=qformer))
    small = compact.shrink(locked, None)
    assert trained in small
    assert not [name for name in small if ".self_attention." in name or "position" in name]
    after = compact.restore(small, qformer, "run")
    assert after.keys() == checkpoint.tensors.keys()
    for name, before in checkpoint.tensors.items():
        same = before.read() if name in states and name not in small else before.read().to(torch.bfloat16).float()
        if name != compact.WORDS and before.nbytes > 4:
            torch.testing.assert_close(after[name].read().float(), same.float(), rtol=0, atol=0, msg=name)
    assert torch.equal(after[compact.WORDS].read()[: len(WORDS)], states[compact.WORDS][: len(WORDS)])
