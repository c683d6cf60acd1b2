"""Attention maps against softmax(q k) written out, and gradient maps against finite differences."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import blip2
from blip2.errors import ConfigError
from blip2.explain.attention_maps import recording
from blip2.inference import Blip2

TEXT = "a dog on the grass"


@pytest.fixture(scope="module")
def model(tiny: Path) -> Blip2:
    return blip2.load(tiny, dtype="fp32")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (60, 80, 3), dtype=np.uint8))


def crosses(model: Blip2) -> list[torch.nn.Module]:
    return [layer.cross_attention for layer in model.stage1.qformer.layers if layer.cross_attention is not None]


def test_maps_sum_to_one(model: Blip2, image: Image.Image) -> None:
    attention = model.attend(image, TEXT)
    assert attention.layers == [0, 2]
    assert attention.queries.shape == (2, 5, 17)
    for maps in (attention.queries, attention.pair_queries):
        assert maps is not None
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 5))
        assert bool((maps >= 0).all())
    assert attention.itc_maps is not None
    assert attention.itm_maps is not None
    assert attention.itc_maps.shape == attention.itm_maps.shape == (2, 17)
    assert attention.heatmap(attention.queries).shape == (2, 5, 4, 4)
    torch.testing.assert_close(attention.heatmap(attention.queries)[1, 2].flatten(), attention.queries[1, 2, 1:])


def test_maps_are_softmax_of_qk(model: Blip2, image: Image.Image) -> None:
    """The queries' projections are caught in the live model's pass, the softmax is numpy's."""
    caught: list[Tensor] = []
    handles = [c.query.register_forward_hook(lambda m, i, out: caught.append(out.detach())) for c in crosses(model)]
    kv = model.image_kv(model.features(image))
    with torch.no_grad():
        model.stage1.qformer.encode_queries(kv)
    for handle in handles:
        handle.remove()
    expected = []
    for query, (keys, _) in zip(caught, kv.layers, strict=True):
        heads, size = keys.shape[1], keys.shape[-1]
        q = query[0].double().numpy().reshape(5, heads, size)
        k = keys[0].double().numpy()
        logits = np.stack([q[:, h] @ k[h].T for h in range(heads)]) / math.sqrt(size)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        expected.append((weights / weights.sum(-1, keepdims=True)).mean(0))
    np.testing.assert_allclose(model.attend(image).queries.numpy(), np.stack(expected), atol=1e-6)


def test_scores_are_the_models_own(model: Blip2, image: Image.Image) -> None:
    attention = model.attend(image, TEXT)
    assert attention.itc is not None
    assert attention.itm == pytest.approx(float(model.match(image, TEXT)), abs=1e-5)
    assert float(attention.itc.max()) == pytest.approx(float(model.similarity(image, TEXT)), abs=1e-5)
    each = model.embed_images(image)[0] @ model.embed_texts(TEXT)[0]
    torch.testing.assert_close(attention.itc, each, atol=1e-5, rtol=0)
    assert attention.winner == int(each.argmax())


def test_the_live_model_is_left_alone(model: Blip2, image: Image.Image) -> None:
    before = {name: id(part) for name, part in model.stage1.qformer.named_modules()}
    shadow, _ = recording(model.stage1.qformer)
    model.attend(image, TEXT)
    assert {name: id(part) for name, part in model.stage1.qformer.named_modules()} == before
    assert all("attend" not in cross.__dict__ for cross in crosses(model))
    assert all(p.grad is None for p in model.stage1.parameters())
    own = dict(model.stage1.qformer.named_parameters())
    assert {n: p.data_ptr() for n, p in shadow.named_parameters()} == {n: p.data_ptr() for n, p in own.items()}


@pytest.mark.parametrize("score", ["itc", "itm"])
def test_gradient_maps_are_finite_differences(tiny: Path, image: Image.Image, score: str) -> None:
    """Weights are shift one by one, in float64, in an attention written out here."""
    model = blip2.load(tiny, dtype="fp32")
    model.stage1.double()
    ids, mask = model.text_tokenizer([TEXT])
    features = model.features(image).double()
    stage1 = model.stage1
    kv = model.image_kv(features)
    shift: dict[str, tuple[int, int, float] | None] = {"at": None}
    seen: dict[int, Tensor] = {}

    def open_attention(number: int):
        def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            weights = torch.einsum("nhqd,nhpd->nhqp", q / math.sqrt(q.shape[-1]), k).softmax(-1)
            seen[number] = weights[0].clone()
            if shift["at"] is not None and shift["at"][0] == number:
                weights.view(-1)[shift["at"][1]] += shift["at"][2]
            return torch.einsum("nhqp,nhpd->nqhd", weights, v).flatten(2)

        return attention

    @torch.no_grad()
    def value() -> float:
        if score == "itm":
            return float(stage1.match_logits(ids, mask, kv)[0, 1])
        queries = stage1.vision_proj(stage1.qformer.encode_queries(kv)[0])[0]
        queries = queries / queries.norm(dim=-1, keepdim=True)
        text = stage1.text_proj(stage1.qformer.encode_text(ids, mask))[0]
        return float((queries @ (text / text.norm())).max())

    with torch.enable_grad():
        shadow, recorded = recording(stage1.qformer)
        if score == "itm":
            total = stage1.itm_head(shadow.encode_pair(ids, mask, kv)).mean(dim=1)[0, 1]
        else:
            embedded = torch.nn.functional.normalize(stage1.vision_proj(shadow.encode_queries(kv)[0]), dim=-1)
            total = (embedded[0] @ stage1.embed_texts(ids, mask)[0].double()).max()
        gradients = [g[0] for g in torch.autograd.grad(total, recorded.probes, retain_graph=True)]
        maps = recorded.relevance(total)
    for number, cross in enumerate(crosses(model)):
        object.__setattr__(cross, "attend", open_attention(number))
    step, rng = 1e-5, np.random.default_rng(0)
    value()
    plain = {number: weights.clone() for number, weights in seen.items()}
    for number, gradient in enumerate(gradients):
        for n in rng.permutation(gradient.numel())[:40].tolist():
            ends = []
            for sign in (1, -1):
                shift["at"] = (number, n, sign * step)
                ends.append(value())
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(gradient.flatten()[n]) == pytest.approx(slope, abs=1e-8, rel=1e-4)
    pairs = [(plain[number], gradient) for number, gradient in enumerate(gradients)]
    expected = [(weights * gradient.clamp(min=0)).sum(dim=1).mean(dim=0) for weights, gradient in pairs]
    torch.testing.assert_close(maps, torch.stack(expected), atol=1e-6, rtol=1e-3)
    assert float(maps.sum()) > 0


def test_words_attend_to_soft_prompts(tiny_opt: Path, image: Image.Image) -> None:
    model = blip2.load(tiny_opt, dtype="fp32")
    assert model.stage2 is not None
    before = model.stage2.language_model.model.config._attn_implementation
    attention = model.attend(image)
    assert attention.caption == model.caption(image)[0]
    assert attention.words is not None
    assert attention.word_prompts is not None
    assert attention.word_maps is not None
    assert attention.word_prompts.shape == (len(attention.words), 5)
    assert bool((attention.word_prompts >= 0).all())
    assert bool((attention.word_prompts.sum(dim=1) <= 1 + 1e-5).all())
    torch.testing.assert_close(attention.word_maps.sum(dim=1), torch.ones(len(attention.words)))
    assert model.stage2.language_model.model.config._attn_implementation == before
    labels = model.language_tokenizer.targets([model.config.language.prompt], [attention.caption])[2]
    assert len(attention.words) == int(labels.sum()) - 1


def test_attention_of_words_is_of_the_position_that_writes_them(tiny_opt: Path, image: Image.Image) -> None:
    """All of a row lies on soft prompts and earlier text: none on what is still to be written."""
    model = blip2.load(tiny_opt, dtype="fp32")
    assert model.stage2 is not None
    attention = model.attend(image)
    tokenizer = model.language_tokenizer
    ids, _, labels = tokenizer.targets([model.config.language.prompt], [str(attention.caption)])
    language = model.stage2.language_model
    with torch.no_grad():
        soft = model.stage2.soft_prompts(model.features(image))
        language.model.set_attn_implementation("eager")
        embeds = torch.cat([soft, language.embed(ids)], dim=1)
        out = language.model(inputs_embeds=embeds, output_attentions=True)
    first = int(labels[0].nonzero()[0])
    writer = 5 + first - 1
    rows = torch.stack([layer[0, :, writer] for layer in out.attentions])
    assert float(rows[..., writer + 1 :].abs().max()) == 0
    torch.testing.assert_close(attention.word_prompts[0], rows.mean(dim=(0, 1))[:5], atol=1e-5, rtol=1e-4)  # type: ignore[index]


def test_words_of_an_encoder_decoder(tiny_t5: Path, image: Image.Image) -> None:
    """Cross-attention of the position that writes each word, against transformers' own pass with open attention."""
    model = blip2.load(tiny_t5, dtype="fp32")
    assert model.stage2 is not None
    language = model.stage2.language_model
    before = language.model.config._attn_implementation
    attention = model.attend(image)
    assert attention.caption == model.caption(image)[0]
    assert attention.words
    assert attention.word_prompts is not None
    assert attention.word_maps is not None
    assert language.model.config._attn_implementation == before
    ids, mask, written, _ = model.language_tokenizer.pairs([model.config.language.prompt], [str(attention.caption)])
    assert len(attention.words) == written.shape[1] - 1  # all but the end token
    with torch.no_grad():
        soft = model.stage2.soft_prompts(model.features(image))
        language.model.set_attn_implementation("eager")
        embeds = torch.cat([soft, language.embed(ids)], dim=1)
        start = torch.tensor([[language.model.config.decoder_start_token_id]])
        for number in range(len(attention.words)):
            given = torch.cat([start, written[:, :number]], dim=1)
            attended = torch.cat([torch.ones(1, 5, dtype=mask.dtype), mask], dim=1)
            out = language.model(
                inputs_embeds=embeds, attention_mask=attended, decoder_input_ids=given, output_attentions=True
            )
            last = torch.stack([layer[0, :, -1, :5] for layer in out.cross_attentions]).mean(dim=(0, 1))
            torch.testing.assert_close(attention.word_prompts[number], last, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attention.word_maps.sum(dim=1), torch.ones(len(attention.words)))


def test_itm_that_was_never_learned_is_left_out(
    tiny: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = blip2.load(tiny, dtype="fp32")
    never = dataclasses.replace(model.config, loss=dataclasses.replace(model.config.loss, itm=0.0))
    monkeypatch.setattr(model, "_stage1_config", never)
    attention = model.attend(image, TEXT)
    assert attention.itm is attention.itm_maps is attention.pair_queries is None
    assert attention.itc_maps is not None
    assert "ITM" not in repr(model.show(image, text=TEXT))


def test_a_text_needs_stage_1(tiny_opt: Path, image: Image.Image) -> None:
    with pytest.raises(ConfigError, match="stage-1 checkpoint"):
        blip2.load(tiny_opt, dtype="fp32").attend(image, TEXT)
