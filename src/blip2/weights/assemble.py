"""From an open checkpoint to its model: towers loaded, bridge filled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from blip2.errors import CheckpointError
from blip2.models.build import build_stage1, build_stage2
from blip2.models.freezing import freeze
from blip2.models.language.model import load_language_model, parameter_count
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder, load_vision_encoder, vision_encoder_from_config
from blip2.ops.devices import fast_dtype, writing_dtype
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.frozen_towers import eva_config
from blip2.weights.loading import LoadReport, fill


def assemble(
    found: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[Stage1 | Stage2, LoadReport]:
    """Model of a checkpoint in eval mode, and what was loaded.

    Args:
        dtype: of the frozen towers; None takes bf16 where the hardware multiplies it fast, but float32 for a small
            language model on a CPU (`blip2.ops.devices.writing_dtype`).
        device_map: where transformers puts the language model; None puts all on `device`.

    Raises:
        CheckpointError: a bare Q-Former, towers that cannot be had, or weights that do not fit.
    """
    if found.partial:
        raise CheckpointError(
            f"{found.source}: a Q-Former alone, without query tokens and image encoder: use it as --init of a training"
        )
    vision = vision_encoder_of(found, dtype or fast_dtype(device))
    if found.config.stage == "stage1":
        stage1 = build_stage1(found.config, vision, start=False)
        report = _filled(stage1, found, vision)
        return stage1.to(device).eval(), report
    dtype = dtype or writing_dtype(device, parameter_count(found.config.language))
    language_model = load_language_model(found.config.language, dtype, device=device, device_map=device_map)
    stage2 = build_stage2(found.config, vision, language_model, start=False)
    report = _filled(stage2, found, vision)
    if device_map is None:
        return stage2.to(device).eval(), report
    for part in (vision, stage2.ln_vision, stage2.qformer, stage2.language_proj):
        part.to(device)
    return stage2.eval(), report


def _filled(model: Stage1 | Stage2, found: Checkpoint, vision: VisionEncoder) -> LoadReport:
    report = fill(model, found.source, found.tensors, found.allowed)
    freeze(vision)
    extra = (vision.interpolated,) if vision.interpolated else ()
    return replace(report, reshaped=(*report.reshaped, *extra))


def vision_encoder_of(found: Checkpoint, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    """Image encoder of a checkpoint: the one that came along in it, else the one that it names.

    Raises:
        CheckpointError: it cannot be had, or a tensor of it is missing or of another shape.
    """
    settings = found.config.vision
    if not found.vision:
        encoder = load_vision_encoder(settings, dtype)
        if settings.train:
            encoder.unfreeze()  # until its own weights are in
        return encoder
    config = eva_config(found)
    encoder = vision_encoder_from_config(
        config, layer=settings.layer, pool=settings.pool, size=settings.image_size, name=found.source
    ).to(dtype)
    own = encoder.model.state_dict()
    for name, value in own.items():
        if name.startswith("post_layernorm."):  # BLIP-2's own `ln_vision` stands in its place
            continue
        lazy = found.vision.get(name)
        if lazy is None or lazy.shape != tuple(value.shape):
            has = "missing" if lazy is None else f"{lazy.shape}, not {tuple(value.shape)}"
            raise CheckpointError(f"{found.source}: {name} of its image encoder is {has}")
        with torch.no_grad():
            value.copy_(lazy.read())
    freeze(encoder)
    return encoder
