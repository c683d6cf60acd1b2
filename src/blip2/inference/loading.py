"""From whatever names a model to a `Blip2`, with the device, precision and towers that the caller asks for."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip2.errors import CheckpointError, ConfigError
from blip2.inference.model import Blip2
from blip2.models.build import build_stage1, build_stage2
from blip2.models.freezing import freeze
from blip2.models.language.model import load_language_model, parameter_count
from blip2.models.qformer.lora import merge_qformer_lora
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder, load_vision_encoder
from blip2.ops.devices import fast_dtype, pick_device, writing_dtype
from blip2.weights import runs
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.formats import located, open_checkpoint
from blip2.weights.frozen_towers import eva_encoder
from blip2.weights.loaded import cast
from blip2.weights.loading import fill


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    vision: str | None = None,
    language: str | None = None,
    quantize: str | None = None,
) -> Blip2:
    """Load a model for use.

    Args:
        source: run folder or weights file of ours, preset name (`tiny`, which comes with the package,
            `blip2-opt-2.7b`), Hugging Face folder or hub id, or LAVIS `.pth`.
        device: `auto` is CUDA where there is one.
        dtype: of the weights (`fp32`, `bf16`, `fp16` or a torch dtype); None takes bf16 where the
            hardware multiplies it fast, else fp32, and fp32 for a language model of up to 500M
            parameters on a CPU and the Q-Former in front of it. Embeddings, similarities, ITM's
            probabilities and log-probabilities are computed in float32 in any case.
        device_map: passed to transformers for the language model (`auto` spreads it over devices,
            needs accelerate).
        vision, language: image encoder and language model in place of those that the checkpoint
            names.
        quantize: `int8` or `nf4` for the language model, `none` for neither; None takes what the
            run was trained with.

    Raises:
        CheckpointError: nothing there, incomplete, damaged, a bare Q-Former, or its weights do not fit.
        ConfigError: a setting that cannot be used.
    """
    home = Path(located(source))
    checkpoint = open_checkpoint(source, vision=vision, language=language)
    if checkpoint.partial:
        raise CheckpointError(
            f"{checkpoint.source}: a Q-Former alone, without query tokens and image encoder: "
            "use it as --init of a training"
        )
    config = checkpoint.config
    if quantize is not None:
        settings = replace(config.language, quantize=None if quantize == "none" else quantize)
        config = replace(config, language=settings)
    place, precision = pick_device(device), torch_dtype(dtype)
    fast = precision or fast_dtype(place)
    encoder = _image_encoder(checkpoint, fast)
    model: Stage1 | Stage2
    if config.stage == "stage1":
        model = build_stage1(config, encoder, start=False)
    else:
        writing = precision or writing_dtype(place, parameter_count(config.language))
        language_model = load_language_model(config.language, writing, device=place, device_map=device_map)
        model = build_stage2(config, encoder, language_model, start=False)
    report = fill(model, checkpoint.source, checkpoint.tensors, checkpoint.allowed)
    freeze(encoder)
    if encoder.interpolated:
        report = replace(report, reshaped=(*report.reshaped, encoder.interpolated))
    if isinstance(model, Stage1):
        model = cast(model, fast).to(place).eval()
        return Blip2(config, stage1=model, home=home, report=report, stage1_tensors=checkpoint.tensors)
    merge_qformer_lora(model.qformer)
    cast(model, writing)
    # with a device map transformers has placed the language model
    parts = (model,) if device_map is None else (encoder, model.ln_vision, model.qformer, model.language_proj)
    for part in parts:
        part.to(place)
    return Blip2(config, stage2=model.eval(), home=home, report=report, dtype=fast)


def _image_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> VisionEncoder:
    """The one that came along in a checkpoint, else the one that it names."""
    if checkpoint.vision:
        return eva_encoder(checkpoint, dtype)
    encoder = load_vision_encoder(checkpoint.config.vision, dtype)
    if checkpoint.config.vision.train:
        encoder.unfreeze()  # until its own weights are in
    return encoder


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its short name.

    Raises:
        ConfigError: unknown.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise ConfigError(f"dtype is {name!r}: it must be one of {', '.join(dtypes)}")
    return dtypes[name]


def load_model(options: argparse.Namespace) -> tuple[Blip2, str]:
    """The model that a command's options name, and that name."""
    name = options.model or default_run()
    if not options.model:
        print(f"model: {name} (--model takes another)", file=sys.stderr)
    model = load(
        name,
        device=options.device,
        dtype=options.dtype,
        vision=options.vision,
        language=options.language,
        quantize=options.quantize,
    )
    model.batch = max(1, options.batch)
    gc.freeze()  # modules and weights stay until the end
    gc.enable()
    report = model.report
    if report and (report.left_out or report.fresh or model.config.recipe in ("huggingface", "lavis")):
        print(report.line(), file=sys.stderr)
    return model, name


def default_run() -> str:
    """`$BLIP2_MODEL`, else the stage-2 run under `runs/` whose weights are newest, else the packaged `tiny`."""
    if name := os.environ.get("BLIP2_MODEL"):
        return name
    newest: tuple[float, str] | None = None
    for config in Path("runs").rglob(runs.CONFIG):
        checkpoints = runs.checkpoints(config.parent)
        if checkpoints and runs.read_config(config).stage == "stage2":
            newest = max(newest or (0.0, ""), (checkpoints[-1][1].stat().st_mtime, str(config.parent)))
    return newest[1] if newest is not None else "tiny"
