"""Tables of names: each is one to one, and depth is counted."""

from __future__ import annotations

import pytest

from blip2.weights import names


@pytest.mark.parametrize("table", [names.huggingface, names.huggingface_qformer, names.lavis, names.eva])
def test_no_two_tensors_share_a_name(table: object) -> None:
    assert callable(table)
    both = table(3)
    assert len(set(both.values())) == len(both) > 30
    assert len(table(4)) > len(both)


@pytest.mark.parametrize(
    "prefix", ["qformer.layers.{}.text_ff.up.weight", "qformer.encoder.layer.{}.x", "Qformer.bert.encoder.layer.{}.x"]
)
def test_depth(prefix: str) -> None:
    assert names.depth_of([prefix.format(n) for n in (0, 0, 1, 11, 2)]) == 4
    assert names.depth_of(["query_tokens", "vision_model.encoder.layers.7.mlp", "language_model.layers.3.x"]) == 0


def test_a_stray_layer_makes_no_giant_table() -> None:
    assert names.depth_of(["encoder.layer.0.x", "encoder.layer.999999999999.x"]) == 2


def test_an_entry_is_a_tensor_or_with_a_dot_a_part() -> None:
    assert names.listed("temp", ("temp",))
    assert not names.listed("temperature", ("temp",))
    assert names.listed("qformer.head.bias", ("qformer.head.",))
    assert not names.listed("qformer.header", ("qformer.head.",))


def from_lavis(name: str, instruct: bool) -> str:
    """A name of LAVIS's as transformers' own conversion scripts rewrite it (order matters)."""
    blip2 = (
        ("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"),
        ("Qformer.bert.embeddings.", "embeddings."),
    )
    for old, new in (
        *((("Qformer.bert.embeddings.LayerNorm", "qformer.embeddings.layernorm"),) if instruct else blip2),
        ("Qformer.bert.", "qformer."),
        ("attention.self.", "attention.attention."),
        ("ln_vision.", "vision_model.post_layernorm."),
        ("opt_proj.", "language_projection."),
        ("t5_proj.", "language_projection."),
        ("llm_proj.", "language_projection."),
        ("vision_proj.", "vision_projection."),
        ("text_proj.", "text_projection."),
    ):
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("projection", names.LAVIS_PROJECTIONS)
def test_lavis_and_transformers_mean_the_same_tensor(projection: str, instruct: bool) -> None:
    """Shapes alone would not tell a query from a key, nor a round trip a swap in both directions."""
    ours_to_lavis, ours_to_hf = names.lavis(3, projection), names.huggingface(3, instruct=instruct)
    for ours in ours_to_hf:
        assert from_lavis(ours_to_lavis[ours], instruct) == ours_to_hf[ours]
    assert {n for n in ours_to_lavis if n not in ours_to_hf} == {
        n for n in ours_to_lavis if names.listed(n, names.HF_WITHOUT)
    }


def test_the_head_is_that_of_bert() -> None:
    table = names.lavis(1)
    for ours, theirs in (("dense", "transform.dense"), ("norm", "transform.LayerNorm")):
        for kind in ("weight", "bias"):
            assert table[f"qformer.head.{ours}.{kind}"] == f"Qformer.cls.predictions.{theirs}.{kind}"
    assert table["qformer.head.bias"] == "Qformer.cls.predictions.bias"


def test_eva_and_transformers_mean_the_same_tensor() -> None:
    for ours, theirs in names.eva(3).items():
        rewritten = theirs.removeprefix("visual_encoder.")
        for old, new in (
            ("blocks.", "encoder.layers."),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("attn.proj", "self_attn.projection"),
            ("attn.qkv", "self_attn.qkv"),
            ("cls_token", "embeddings.class_embedding"),
            ("pos_embed", "embeddings.position_embedding"),
            ("patch_embed.proj", "embeddings.patch_embedding"),
        ):
            rewritten = rewritten.replace(old, new)
        assert rewritten == ours
