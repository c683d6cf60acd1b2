"""The precision that a loaded model runs in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import blip2
from blip2.search.model_id import identify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_qformer_runs_in_the_dtype_and_its_heads_in_float32(tiny: Path, dtype: torch.dtype) -> None:
    stage1 = blip2.load(tiny, device="cpu", dtype=dtype).stage1
    inside = {p.dtype for part in (stage1.vision, stage1.ln_vision, stage1.qformer) for p in part.parameters()}
    outside = {p.dtype for p in (*stage1.vision_proj.parameters(), *stage1.itm_head.parameters(), stage1.temp)}
    assert (inside, outside) == ({dtype}, {torch.float32})


def test_embeddings_and_matches_in_bf16_are_near_float32s(tiny: Path, photos: Path) -> None:
    images, texts = sorted(photos.glob("*.png")), ["a red cat", "two dogs in the snow"]
    exact, fast = (blip2.load(tiny, device="cpu", dtype=dtype) for dtype in ("fp32", "bf16"))
    for exact_BE, fast_BE in (
        (exact.embed_images(images), fast.embed_images(images)),
        (exact.embed_texts(texts), fast.embed_texts(texts)),
    ):
        assert fast_BE.dtype == torch.float32
        assert not torch.equal(exact_BE, fast_BE)
        assert torch.allclose(fast_BE.norm(dim=-1), torch.ones(fast_BE.shape[:-1]), atol=1e-6)
        # a cosine of 0.999 is 2.6 degrees
        assert (exact_BE * fast_BE).sum(dim=-1).min() > 0.999
    gap = exact.match(images, texts[0]) - fast.match(images, texts[0])
    assert gap.abs().max() < 0.02


def test_an_index_knows_its_model_in_any_precision(tiny: Path) -> None:
    exact, fast = (identify(blip2.load(tiny, device="cpu", dtype=dtype), "tiny") for dtype in ("fp32", "bf16"))
    assert exact == fast


def test_captions_of_a_stage_1_in_bf16_do_not_depend_on_the_batch(tiny: Path, photos: Path) -> None:
    images, model = sorted(photos.glob("*.png")), blip2.load(tiny, device="cpu", dtype="bf16")
    lengths = {"min_tokens": 4, "max_tokens": 8}
    together = model.caption(images, **lengths)
    assert together == [model.caption(image, **lengths)[0] for image in images]
