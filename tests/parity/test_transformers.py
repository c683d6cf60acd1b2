"""Ours against transformers on the same random weights: logits, losses, generated ids, both heads.

Tolerance: float32 rounding. Both run the same sums in another order (keys/values projected once, text
packed, the head at targets only) through two towers and three Q-Former layers; the largest absolute
difference is asked to be within 1e-5 of the largest logit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip2
from blip2.configs import DecodingConfig

HF = Callable[[str], tuple[Path, Any]]
QUERIES = 5


def same(ours: Tensor, theirs: Tensor) -> None:
    scale = float(theirs.abs().max())
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-5 * scale


def pixels() -> Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(3))


def placeholders(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """transformers' inputs: image tokens before the text."""
    images = torch.full((len(ids), QUERIES), model.config.image_token_id)
    return {
        "input_ids": torch.cat([images, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), mask.long()], dim=1),
    }


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_soft_prompts(hf: HF, kind: str) -> None:
    folder, theirs = hf(kind)
    ours = blip2.load(folder, dtype="fp32")
    assert ours.stage2 is not None
    with torch.no_grad():
        soft = ours.stage2.soft_prompts(ours.vision(pixels()))
        same(soft, theirs.get_image_features(pixels(), return_dict=True).pooler_output)


def test_decoder_loss_and_its_gradient(hf: HF) -> None:
    folder, theirs = hf("opt")
    ours = blip2.load(folder, dtype="fp32")
    assert ours.stage2 is not None
    tokenizer = ours.language_tokenizer
    ids, mask, labels = tokenizer.targets(["a photo of"] * 3, ["a dog", "two cats on a red sofa", "it"])
    soft = ours.stage2.soft_prompts(ours.vision(pixels()))
    loss = ours.stage2.language_model.decoder_loss(soft, ids, mask, labels)
    reference = theirs(pixel_values=pixels(), **placeholders(theirs, ids, mask))
    at = reference.logits[:, QUERIES - 1 : -1][labels]
    expected = torch.nn.functional.cross_entropy(at, ids[labels])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    same(ours.stage2.language_proj.weight.grad, theirs.language_projection.weight.grad)
    same(ours.stage2.qformer.query_tokens.grad, theirs.query_tokens.grad[0])
    theirs.zero_grad()


def test_encoder_decoder_loss(hf: HF) -> None:
    folder, theirs = hf("t5")
    ours = blip2.load(folder, dtype="fp32")
    assert ours.stage2 is not None
    enc_ids, enc_mask, dec_ids, dec_mask = ours.language_tokenizer.pairs(
        ["a photo of", "two"], ["a dog", "red cats on"]
    )
    with torch.no_grad():
        soft = ours.stage2.soft_prompts(ours.vision(pixels()[:2]))
        loss = ours.stage2.language_model.encoder_decoder_loss(soft, enc_ids, enc_mask, dec_ids, dec_mask)
        labels = dec_ids.masked_fill(~dec_mask, -100)
        inputs = placeholders(theirs, enc_ids, enc_mask)
        expected = theirs(pixel_values=pixels()[:2], labels=labels, **inputs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("beams", [1, 5])
def test_generated_ids(hf: HF, kind: str, beams: int) -> None:
    folder, theirs = hf(kind)
    ours = blip2.load(folder, dtype="fp32")
    assert ours.stage2 is not None
    tokenizer = ours.language_tokenizer
    ids, mask = tokenizer.prompts(["a photo of"] * 3)
    options = {"min_new_tokens": 3, "max_new_tokens": 12, "num_beams": beams}
    if beams > 1:
        options["length_penalty"] = -1.0
    with torch.no_grad():
        soft = ours.stage2.soft_prompts(ours.vision(pixels()))
        found = ours.stage2.language_model.generate(
            soft,
            ids,
            mask,
            DecodingConfig(beams=beams, min_tokens=3, max_tokens=12, length_penalty=-1.0),
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
        )
        expected = theirs.generate(
            pixels(),
            **placeholders(theirs, ids, mask),
            do_sample=False,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.pad_id,
            **options,
        )
    skip = 1 if kind == "t5" else QUERIES + ids.shape[1]
    assert torch.equal(found, expected[:, skip:])


def test_retrieval_heads(hf: HF) -> None:
    folder, theirs = hf("itm")
    ours = blip2.load(folder, dtype="fp32")
    texts = ["a dog on the grass", "two cats", "a red sofa"]
    ids, mask = ours.text_tokenizer(texts)
    with torch.no_grad():
        features = ours.vision(pixels())
        inputs = {"pixel_values": pixels(), "input_ids": ids, "attention_mask": mask.long()}
        itc = theirs(**inputs, use_image_text_matching_head=False)
        itm = theirs(**inputs, use_image_text_matching_head=True)
        kv = ours.image_kv(features)
        embedded, _ = ours.stage1.embed_images(kv)
        same(embedded, itc.image_embeds)
        same(ours.stage1.embed_texts(ids, mask), itc.text_embeds)
        same(ours.stage1.match_logits(ids, mask, kv), itm.logits_per_image)
        best = torch.einsum("bqe,ne->bnq", embedded, ours.stage1.embed_texts(ids, mask)).amax(-1)
        same(best, itc.logits_per_image)


def test_captions_in_words(hf: HF) -> None:
    folder, _ = hf("opt")
    ours = blip2.load(folder, dtype="fp32")
    assert ours.report is not None
    assert ours.report.fresh == ()
    features = ours.vision(pixels())
    texts = ours.caption_features(features, None, DecodingConfig(beams=2, max_tokens=9))
    assert len(texts) == 3
    assert all(isinstance(row[0], str) for row in texts)


def test_what_transformers_has_no_place_for_starts_fresh(hf: HF) -> None:
    ours = blip2.load(hf("itm")[0], dtype="fp32")
    assert ours.report is not None
    assert {name.split(".")[0] for name in ours.report.fresh} == {"temp", "qformer"}
    assert all(name == "temp" or name.startswith("qformer.head.") for name in ours.report.fresh)
