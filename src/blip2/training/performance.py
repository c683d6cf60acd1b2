"""Settings that trade time for memory, or compile time for speed."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from blip2.configs import TrainConfig
from blip2.errors import ConfigError
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder

# A layer is compiled for each kind of pass (ITC, ITM, ITG; padded or not; one length, then any).
_RECOMPILES = 64


def apply_settings(model: Stage1 | Stage2, config: TrainConfig) -> None:
    """Apply `train.checkpoint`, `train.head_chunk` and `train.compile` to a model.

    Raises:
        ConfigError: no C++ compiler, or a language model whose head cannot be run in chunks.
    """
    compiling: dict[str, Any] = {}
    if config.compile:
        require_compiler("train.compile")
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILES)
        # eager's random numbers, so that dropout is the same; else a resumed run could not turn it on or off
        compiling = {"options": {"fallback_random": True}}
    if isinstance(model.qformer, QFormer):
        model.qformer.gradient_checkpointing = config.checkpoint
        model.qformer.head_chunk = config.head_chunk
        if config.compile:
            model.qformer.compile_layers(**compiling)
    if isinstance(model, Stage2):
        model.language_model.gradient_checkpointing = config.checkpoint
        model.language_model.chunk_head(config.head_chunk)
        if config.compile:
            model.language_model.compile_blocks(**compiling)
    if config.compile and isinstance(model.vision, VisionEncoder) and model.vision.frozen:
        model.vision.compile_blocks(**compiling)


def require_compiler(setting: str) -> None:
    """Refuse a setting that needs a compiler where there is none.

    Raises:
        ConfigError: no C++ compiler.
    """
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++"])):
        missing = f"CXX is {named!r}, which is not there" if named else "no g++ or clang++ is installed"
        raise ConfigError(f"{setting} needs a C++ compiler: {missing}; install one, or turn the setting off")
