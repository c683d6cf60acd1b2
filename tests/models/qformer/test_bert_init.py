"""A Q-Former that starts from BERT: its text branch alone is that BERT, and nothing is guessed."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from blip2.configs import QFormerConfig
from blip2.errors import CheckpointError
from blip2.models.build import build_qformer
from blip2.models.qformer.bert_init import load_bert
from blip2.models.qformer.model import QFormer

BERT = BertConfig(
    vocab_size=17,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=10,
    layer_norm_eps=1e-6,
    initializer_range=0.3,
)


@pytest.fixture
def bert() -> BertForMaskedLM:
    """A random BERT with its prediction head, every tensor of it random."""
    model = BertForMaskedLM(BERT).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def state_of(bert: BertForMaskedLM) -> dict[str, Tensor]:
    return {k: v for k, v in bert.state_dict().items() if "decoder" not in k}


def fresh(*, text: bool = True, pool: Literal["cls", "mean"] = "cls") -> QFormer:
    return build_qformer(QFormerConfig(queries=2, text_pool=pool), 6, BERT, text=text).eval()


def ids_and_mask() -> tuple[Tensor, Tensor]:
    mask = torch.arange(7) < torch.tensor([7, 3, 1])[:, None]
    return torch.randint(1, 17, (3, 7)) * mask, mask


def test_sizes_follow_the_config() -> None:
    qformer = fresh()
    assert (qformer.width, qformer.depth, qformer.layers[0].self_attention.heads) == (16, 3, 4)
    assert qformer.layers[0].text_ff.up.out_features == 24
    assert qformer.embeddings.position.num_embeddings == 10
    assert qformer.embedding_norm.eps == 1e-6


def test_the_text_branch_alone_is_bert(bert: BertForMaskedLM) -> None:
    """Token types folded into the positions included; float32, so 1e-5 is rounding over 3 layers."""
    qformer = fresh()
    load_bert(qformer, state_of(bert), "bert")
    ids, mask = ids_and_mask()
    want = bert.bert(ids, attention_mask=mask.long()).last_hidden_state[:, 0]
    torch.testing.assert_close(qformer.encode_text(ids, mask), want, rtol=1e-4, atol=1e-5)


def test_the_mean_over_tokens_is_berts(bert: BertForMaskedLM) -> None:
    qformer = fresh(pool="mean")
    load_bert(qformer, state_of(bert), "bert")
    ids, mask = ids_and_mask()
    with torch.no_grad():
        hidden = bert.bert(ids, attention_mask=mask).last_hidden_state
        own = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(qformer.encode_text(ids, mask), own, rtol=1e-5, atol=1e-5)
        full = torch.ones(2, 4, dtype=torch.bool)  # nothing padded
        own = bert.bert(ids[:2, :4], attention_mask=full).last_hidden_state.mean(1)
        torch.testing.assert_close(qformer.encode_text(ids[:2, :4], full), own, rtol=1e-5, atol=1e-5)


def test_the_head_is_berts(bert: BertForMaskedLM) -> None:
    qformer = fresh()
    load_bert(qformer, state_of(bert), "bert")
    hidden = torch.randn(4, 16)
    torch.testing.assert_close(qformer.head(hidden, qformer.embeddings.word)[:, :17], bert.cls(hidden))


def test_a_bert_without_prefix_or_head_will_do(bert: BertForMaskedLM) -> None:
    """`BertModel`'s names, with its pooler left out; the prediction head keeps its initialisation."""
    qformer = fresh()
    before = copy.deepcopy(qformer.head.state_dict())
    unfilled = load_bert(qformer, BertModel(BERT).state_dict(), "bert")
    assert {"head.dense.weight", "head.bias"} <= set(unfilled)
    assert all(torch.equal(value, before[name]) for name, value in qformer.head.state_dict().items())


def test_query_feed_forwards_are_copies_of_the_texts(bert: BertForMaskedLM) -> None:
    qformer = fresh()
    load_bert(qformer, state_of(bert), "bert")
    for layer in qformer.layers:
        for (name, query), (_, text) in zip(
            layer.query_ff.named_parameters(), layer.text_ff.named_parameters(), strict=True
        ):
            assert torch.equal(query, text), name
            assert query.data_ptr() != text.data_ptr(), f"{name} must train apart"


def test_what_bert_does_not_have_stays_fresh(bert: BertForMaskedLM) -> None:
    qformer = fresh()
    before = copy.deepcopy(qformer.state_dict())
    unfilled = load_bert(qformer, state_of(bert), "bert")
    after = qformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in unfilled)
    assert {name.split(".")[0] if "cross" not in name else "cross" for name in unfilled} == {"query_tokens", "cross"}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == set(after) - set(unfilled)


def test_the_dec_row_stays_fresh(bert: BertForMaskedLM) -> None:
    qformer = fresh()
    before = qformer.embeddings.word.weight[17].clone()
    load_bert(qformer, state_of(bert), "bert")
    assert torch.equal(qformer.embeddings.word.weight[17], before)
    assert torch.equal(qformer.embeddings.word.weight[:17], bert.bert.embeddings.word_embeddings.weight)
    assert qformer.head.bias[17] == 0


def test_without_text_branch_only_the_query_side_is_filled(bert: BertForMaskedLM) -> None:
    """It equals the query side of a Q-Former with text that started from the same BERT."""
    complete, queries = fresh(), fresh(text=False)
    unfilled = load_bert(queries, state_of(bert), "bert")
    load_bert(complete, state_of(bert), "bert")
    filled = set(queries.state_dict()) - set(unfilled)
    assert any("query_ff" in name for name in filled)
    assert all(torch.equal(queries.state_dict()[name], complete.state_dict()[name]) for name in filled)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert.encoder.layer.2.output.dense.weight", "encoder.layer.2.output.dense.weight is missing"),
        ("bert.embeddings.LayerNorm.bias", "embeddings.LayerNorm.bias is missing"),
        ("cls.predictions.transform.dense.bias", "cls.predictions.transform.dense.bias is missing"),
    ],
)
def test_a_missing_tensor_is_refused(bert: BertForMaskedLM, name: str, message: str) -> None:
    state = state_of(bert)
    del state[name]
    with pytest.raises(CheckpointError, match=f"^some/folder: {message}, so it is not a BERT-type checkpoint$"):
        load_bert(fresh(), state, "some/folder")


@pytest.mark.parametrize("name", ["bert.encoder.layer.3.output.dense.weight", "bert.encoder.rel_pos.weight", "lm_head"])
def test_an_extra_tensor_is_refused(bert: BertForMaskedLM, name: str) -> None:
    state = state_of(bert) | {name: torch.zeros(2)}
    with pytest.raises(CheckpointError, match=f"some/folder: {name.removeprefix('bert.')} has no place"):
        load_bert(fresh(), state, "some/folder")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bert.encoder.layer.0.attention.self.query.weight", (16, 8)),
        ("bert.encoder.layer.0.intermediate.dense.bias", (12,)),
        ("bert.embeddings.LayerNorm.weight", (8,)),
        ("bert.embeddings.position_embeddings.weight", (5, 16)),
        ("bert.embeddings.word_embeddings.weight", (19, 16)),
    ],
)
def test_another_shape_is_refused_with_both(bert: BertForMaskedLM, name: str, shape: tuple[int, ...]) -> None:
    """Fewer rows are no excuse either, but for the vocabulary, which has a row for [DEC]."""
    state = state_of(bert) | {name: torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=rf"is \({shape[0]},.*\), the Q-Former needs \(\d+,"):
        load_bert(fresh(), state, "some/folder")
