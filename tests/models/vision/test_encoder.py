"""Image encoders of every kind: layers, pooling, sizes, partial loading, frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BeitConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    OPTConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from blip2.configs import VisionConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.models.freezing import assert_frozen
from blip2.models.vision.encoder import CLIP_MEAN, VisionEncoder, load_vision_encoder, vision_encoder_from_config

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
KINDS: dict[str, Any] = {
    "clip": CLIPVisionConfig(**SIZES, intermediate_size=64),
    "siglip": SiglipVisionConfig(**SIZES, intermediate_size=64),
    "dinov2": Dinov2Config(**SIZES),
    "registers": Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2),
    "vit": ViTConfig(**SIZES, intermediate_size=64),
    "beit": BeitConfig(**SIZES, intermediate_size=64, use_relative_position_bias=True),
    "blip2": Blip2VisionConfig(**SIZES, intermediate_size=64),
}
PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "registers": 3, "vit": 1, "beit": 1, "blip2": 1}


def build(kind: str, **options: Any) -> VisionEncoder:
    torch.manual_seed(0)
    return vision_encoder_from_config(copy.deepcopy(KINDS[kind]), **options)


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_width_are_what_comes_out(kind: str) -> None:
    encoder = build(kind)
    assert encoder.tokens == PREFIX[kind] + 16
    assert encoder(pixels()).shape == (2, encoder.tokens, encoder.width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, -2])
def test_layer_is_the_output_of_that_block(kind: str, layer: int) -> None:
    model = build(kind).model
    if kind == "blip2":  # `build` already reads the last block there
        model = build(kind, layer=2).model
    with torch.no_grad():
        states = model(pixel_values=pixels(), output_hidden_states=True).hidden_states
    chosen = build(kind, layer=layer)
    blocks = max((m for m in chosen.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    assert len(blocks) == (1 if layer == 0 else 2), "later blocks leave memory"
    torch.testing.assert_close(chosen(pixels()), states[(layer % 3) + 1], rtol=0, atol=1e-6)


def test_no_layer_is_the_models_own_last_state() -> None:
    encoder = build("dinov2")
    with torch.no_grad():
        own = encoder.model(pixel_values=pixels()).last_hidden_state
    torch.testing.assert_close(encoder(pixels()), own, rtol=0, atol=0)


def test_blip2_ends_before_its_own_norm() -> None:
    encoder = build("blip2")
    normed = encoder.model.post_layernorm(encoder(pixels()))
    with torch.no_grad():
        own = encoder.model(pixel_values=pixels()).last_hidden_state
    torch.testing.assert_close(normed, own, rtol=0, atol=1e-6)
    assert encoder.layer == -1


@pytest.mark.parametrize("kind", ["siglip", "registers", "clip"])
def test_pooling_averages_squares_of_patches(kind: str) -> None:
    full, pooled = build(kind)(pixels()), build(kind, pool=2)
    prefix, out = PREFIX[kind], pooled(pixels())
    assert out.shape[1] == pooled.tokens == prefix + 4
    torch.testing.assert_close(out[:, :prefix], full[:, :prefix], rtol=0, atol=0)
    first = full[:, [prefix + i for i in (0, 1, 4, 5)]].mean(dim=1)
    last = full[:, [prefix + i for i in (10, 11, 14, 15)]].mean(dim=1)
    torch.testing.assert_close(out[:, prefix], first)
    torch.testing.assert_close(out[:, -1], last)


@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_interpolate_positions(kind: str) -> None:
    encoder = build(kind, size=48)
    assert encoder(pixels(48)).shape == (2, PREFIX[kind] + 36, 32)
    assert build(kind, size=48, layer=-2)(pixels(48)).shape == (2, PREFIX[kind] + 36, 32)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="vision.pool is 3"):
        build("vit", pool=3)
    with pytest.raises(ConfigError, match="vision.layer is 3: .* 3 blocks"):
        build("vit", layer=3)
    with pytest.raises(ConfigError, match="40 x 40 pixels given to an encoder of 32 x 32"):
        build("vit")(pixels(40))
    with pytest.raises(ConfigError, match="opt is not an image encoder"):
        vision_encoder_from_config(OPTConfig())


def test_frozen_whatever_train_says_and_features_feed_training() -> None:
    encoder = build("vit")
    parent = torch.nn.Sequential(encoder, torch.nn.Linear(32, 1)).train()
    assert not encoder.training
    assert not encoder.model.training
    parent(pixels()).sum().backward()
    assert_frozen(encoder)
    assert parent[1].weight.grad is not None


def test_unfrozen_encoder_trains() -> None:
    encoder = build("vit").requires_grad_(True).train()
    assert encoder.training
    encoder(pixels()).sum().backward()
    assert any(p.grad is not None for p in encoder.parameters())


def test_id_tells_settings_apart() -> None:
    ids = {build("vit", **o).id for o in ({}, {"layer": -1}, {"layer": -2}, {"pool": 2}, {"size": 48}, {"name": "x"})}
    assert len(ids) == 6


def test_meta_device_needs_no_memory() -> None:
    with torch.device("meta"):
        encoder = vision_encoder_from_config(Blip2VisionConfig(), layer=-1)
    assert all(p.is_meta for p in encoder.parameters())
    assert (encoder.width, encoder.tokens) == (1408, 257)


def _full_model(kind: str) -> Any:
    torch.manual_seed(0)
    vision = {**SIZES, "intermediate_size": 64}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "clip":
        part = CLIPTextConfig(**text, vocab_size=50).to_dict()
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=part))
    if kind == "siglip":
        part = SiglipTextConfig(**text, vocab_size=50).to_dict()
        return SiglipModel(SiglipConfig(vision_config=vision, text_config=part))
    opt = OPTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=50, word_embed_proj_dim=16
    )
    qformer = Blip2QFormerConfig(**text, vocab_size=50, encoder_hidden_size=32)
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer.to_dict(), text_config=opt.to_dict(), num_query_tokens=4
    )
    return Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["clip", "siglip", "blip2"])
def test_only_the_image_part_of_a_full_model_is_loaded(kind: str, tmp_path: Any) -> None:
    full = _full_model(kind).eval()
    full.save_pretrained(tmp_path)
    encoder = load_vision_encoder(VisionConfig(name=str(tmp_path), layer=-1, image_size=None))
    with torch.no_grad():
        states = full.vision_model(pixel_values=pixels(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder(pixels()), states[3], rtol=0, atol=1e-6)
    assert_frozen(encoder)
    assert encoder.mean == (CLIP_MEAN if kind != "siglip" else (0.5, 0.5, 0.5))


def test_preprocessor_of_the_folder_decides_mean_and_std(tmp_path: Any) -> None:
    build("vit").model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    encoder = load_vision_encoder(VisionConfig(name=str(tmp_path), image_size=None))
    assert encoder.mean == (0.1, 0.2, 0.3)
    assert encoder.std == (1, 2, 3)
    torch.testing.assert_close(encoder(pixels()), build("vit")(pixels()), rtol=0, atol=0)


def test_missing_and_incomplete_models_are_named(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match="nowhere/at/all: no such folder"):
        load_vision_encoder(VisionConfig(name="nowhere/at/all"))
    with pytest.raises(CheckpointError, match="not a folder that transformers can load"):
        load_vision_encoder(VisionConfig(name=str(tmp_path)))
    config = ViTConfig(**{**SIZES, "num_hidden_layers": 2}, intermediate_size=64)
    vision_encoder_from_config(config).model.save_pretrained(tmp_path)
    KINDS["vit"].save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="weights of ViTModel are missing, the first is"):
        load_vision_encoder(VisionConfig(name=str(tmp_path), image_size=None))
