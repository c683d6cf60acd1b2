"""From whatever names a model to a `Blip2`: its device, precision and towers as the caller wants them."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip2.errors import ConfigError
from blip2.inference.model import Blip2
from blip2.models.stage1 import Stage1
from blip2.ops.devices import pick_device
from blip2.weights import runs
from blip2.weights.assemble import assemble
from blip2.weights.formats import located, open_checkpoint


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
        dtype: of the frozen towers (`fp32`, `bf16`, `fp16` or a torch dtype); None takes bf16
            where the hardware multiplies it fast, else fp32, and fp32 for a language model of up to
            500M parameters on a CPU. The Q-Former stays in float32.
        device_map: passed to transformers for the language model (`auto` spreads it over devices,
            needs accelerate).
        vision, language: image encoder and language model in place of those that the checkpoint
            names.
        quantize: `int8` or `nf4` for the language model, `none` for neither; None takes what the
            run was trained with.

    Raises:
        CheckpointError: nothing there, incomplete, damaged, or its weights do not fit.
        ConfigError: a setting that cannot be used.
    """
    home = Path(located(source))
    found = open_checkpoint(source, vision=vision, language=language)
    if quantize is not None:
        settings = replace(found.config.language, quantize=None if quantize == "none" else quantize)
        found = replace(found, config=replace(found.config, language=settings))
    model, report = assemble(found, device=pick_device(device), dtype=torch_dtype(dtype), device_map=device_map)
    if isinstance(model, Stage1):
        return Blip2(found.config, stage1=model, home=home, report=report)
    return Blip2(found.config, stage2=model, home=home, report=report)


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its short name.

    Raises:
        ConfigError: unknown.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in known:
        raise ConfigError(f"dtype is {name!r}: it must be one of {', '.join(known)}")
    return known[name]


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
    report = model.report
    if report and (report.left_out or report.fresh or model.config.recipe in ("huggingface", "lavis")):
        print(report.line(), file=sys.stderr)
    return model, name


def default_run() -> str:
    """`$BLIP2_MODEL`, else the stage-2 run under `runs/` whose weights are newest, else the packaged `tiny`."""
    named = os.environ.get("BLIP2_MODEL")
    if named:
        return named
    newest: tuple[float, str] | None = None
    for config in Path("runs").rglob(runs.CONFIG):
        found = runs.checkpoints(config.parent)
        if found and runs.read_config(config).stage == "stage2":
            newest = max(newest or (0.0, ""), (found[-1][1].stat().st_mtime, str(config.parent)))
    return newest[1] if newest is not None else "tiny"
