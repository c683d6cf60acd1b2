"""Our models at a benchmark's size with random weights, and the file that hands them to a peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.harness.common import Size
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.weights import names

WEIGHTS = "weights.safetensors"


def qformer(size: Size, *, text: bool) -> QFormer:
    """A Q-Former without dropout, so that both sides compute the same."""
    return QFormer(
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        inner=size.inner,
        image_width=size.channels,
        queries=size.queries,
        vocab=size.words + 1 if text else None,
        positions=size.positions,
        dropout=0.0,
        attention_dropout=0.0,
    )


def stage1(size: Size) -> Stage1:
    """A stage-1 model without its image encoder."""
    return Stage1(qformer(size, text=True), embed_dim=size.embed_dim)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move what starts at zero or one, so that a bias or a norm left out shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.numel() > 1:
            parameter += torch.randn_like(parameter) * 0.02


def weights_dtype(settings: dict[str, Any]) -> torch.dtype:
    """The dtype that a claim about use loads weights in: `--precision bf16` casts them, as `dtype` of `blip2.load`."""
    return torch.bfloat16 if settings.get("weights") == "bf16" else torch.float32


def write_stage1(folder: str | Path, size: Size, seed: int = 0) -> None:
    """Random weights of stage 1 under LAVIS's names, as `blip2 convert --to lavis` writes them."""
    torch.manual_seed(seed)
    model = stage1(size)
    shake(model)
    both = names.lavis(size.depth)
    values = {both[ours]: value.contiguous() for ours, value in model.state_dict().items()}
    values["query_tokens"], values["temp"] = values["query_tokens"][None], values["temp"].reshape(())
    save_file(values, Path(folder) / WEIGHTS)


def read_stage1(folder: str | Path, size: Size) -> Stage1:
    """The model of `write_stage1`."""
    with torch.device("meta"):
        model = stage1(size)
    both = names.lavis(size.depth)
    stored = load_file(Path(folder) / WEIGHTS)
    shapes = {ours: value.shape for ours, value in model.state_dict().items()}
    model.load_state_dict({ours: stored[both[ours]].view(shapes[ours]).clone() for ours in shapes}, assign=True)
    return model


def size_of(settings: dict[str, Any]) -> Size:
    """The size in a side's settings."""
    return Size(**settings["size"])
