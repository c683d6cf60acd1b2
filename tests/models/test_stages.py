"""The two stage models: widths, norms, heads and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from blip2.models.language.model import language_model_from_config
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2

Q, D, C, P, E = 3, 8, 6, 5, 4


def qformer(vocab: int | None = 13) -> QFormer:
    return QFormer(width=D, depth=2, heads=2, inner=12, image_width=C, queries=Q, vocab=vocab, positions=9).eval()


def stage2() -> Stage2:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return Stage2(qformer(None), language_model_from_config(config)).eval()


def test_embeddings_are_unit_vectors_of_projected_outputs() -> None:
    model = Stage1(qformer(), embed_dim=E).eval()
    features = torch.randn(2, P, C)
    kv = model.project_image(features)
    images, cache = model.embed_images(kv)
    ids, mask = torch.randint(13, (3, 4)), torch.ones(3, 4, dtype=torch.bool)
    text = model.embed_texts(ids, mask)
    assert (images.shape, text.shape, len(cache)) == ((2, Q, E), (3, E), 2)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(2, Q))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    normalised = F.layer_norm(features, (C,), model.ln_vision.weight, model.ln_vision.bias, eps=1e-5)
    outputs, _ = model.qformer.encode_queries(model.qformer.project_image(normalised))
    torch.testing.assert_close(images, F.normalize(model.vision_proj(outputs), dim=-1))


def test_match_logits_are_the_mean_over_queries() -> None:
    model = Stage1(qformer(), embed_dim=E).eval()
    kv = model.project_image(torch.randn(2, P, C))
    ids, mask = torch.randint(13, (4, 3)), torch.ones(4, 3, dtype=torch.bool)
    per_query = model.itm_head(model.qformer.encode_pair(ids, mask, kv))
    assert model.match_logits(ids, mask, kv).shape == (4, 2)
    torch.testing.assert_close(model.match_logits(ids, mask, kv), per_query.mean(dim=1))


def test_one_image_and_one_text_keep_their_axes() -> None:
    model = Stage1(qformer(), embed_dim=E).eval()
    kv = model.project_image(torch.randn(1, P, C))
    ids, mask = torch.tensor([[1]]), torch.tensor([[True]])
    assert model.embed_images(kv)[0].shape == (1, Q, E)
    assert model.embed_texts(ids, mask).shape == (1, E)
    assert model.match_logits(ids, mask, kv).shape == (1, 2)


def test_the_temperature_starts_where_the_config_says() -> None:
    assert Stage1(qformer(), temperature=0.07).temp.tolist() == pytest.approx([0.07])


def test_bf16_features_are_taken() -> None:
    """As a feature cache keeps them, or an encoder in bf16 gives them."""
    features = torch.randn(2, P, C).bfloat16()
    first, second = Stage1(qformer(), embed_dim=E).eval(), stage2()
    torch.testing.assert_close(
        first.embed_images(first.project_image(features))[0],
        first.embed_images(first.project_image(features.float()))[0],
    )
    torch.testing.assert_close(second.soft_prompts(features), second.soft_prompts(features.float()))


def test_soft_prompts_are_as_wide_as_the_language_model() -> None:
    model = stage2()
    features = torch.randn(2, P, C)
    prompts = model.soft_prompts(features)
    assert prompts.shape == (2, Q, 16)
    outputs, _ = model.qformer.encode_queries(model.qformer.project_image(model.ln_vision(features)))
    torch.testing.assert_close(prompts, model.language_proj(outputs))


def test_the_language_model_stays_frozen() -> None:
    names = {name.split(".")[0] for name, p in stage2().named_parameters() if p.requires_grad}
    assert names == {"ln_vision", "qformer", "language_proj"}


def test_stage_1_wants_the_text_branch() -> None:
    with pytest.raises(ValueError, match="text branch"):
        Stage1(qformer(None))
