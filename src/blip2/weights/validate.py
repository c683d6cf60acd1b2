"""Whether a checkpoint holds all that its model has, before anything is built, read or written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2.errors import CheckpointError
from blip2.models.build import EXTRA_TOKENS, bert_config, build_qformer
from blip2.models.freezing import is_adapter
from blip2.models.stage1 import Stage1
from blip2.models.towers import TOWERS
from blip2.weights import names
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.loading import IMAGE_PLACES, QFORMER, VISION, compare


def require_complete(checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's tensors with those that its stage trains, which are laid out on the meta device.

    Adapters are compared with each other: their language model is not at hand here, and no more is the
    image encoder, where that was trained.

    Raises:
        CheckpointError: names the first missing, unexpected or differently shaped tensor.
    """
    tensors = checkpoint.tensors.items()
    own = {name: lazy for name, lazy in tensors if not is_adapter(name) and not name.startswith(VISION)}
    compare(_trained(checkpoint), checkpoint.source, own, checkpoint.allowed)
    _require_pairs(checkpoint)


def _require_pairs(checkpoint: Checkpoint) -> None:
    """Every adapter has both its matrices, [rank, in] and [out, rank]."""
    for name in filter(is_adapter, checkpoint.tensors):
        own = name.startswith(QFORMER)
        rank = checkpoint.config.lora.qformer_rank if own else checkpoint.config.lora.rank
        pair = [re.sub(r"\.lora_[AB](?=\.|$)", f".lora_{kind}", name) for kind in "AB"]
        first, second = (_shape(checkpoint, one, 2) for one in pair)
        if (first[0], second[1]) != (rank, rank):
            raise CheckpointError(
                f"{checkpoint.source}: the adapter of {name} is {first} and {second}, and "
                f"lora.{'qformer_' if own else ''}rank of its run is {rank}"
            )


def _trained(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What trains of the checkpoint's stage; widths of its towers are taken from its own tensors."""
    settings, first = checkpoint.config.qformer, checkpoint.config.stage == "stage1"
    width = _shape(checkpoint, "ln_vision.weight", 1)[0]
    with torch.device("meta"):
        state, inner = {}, width
        if settings.bridge == "qformer":
            text = first or settings.instruction is not None
            qformer = build_qformer(settings, width, _bert(checkpoint), text=text, head=first)
            if first:
                return Stage1(qformer, embed_dim=settings.embed_dim).state_dict()
            state, inner = {f"qformer.{name}": value for name, value in qformer.state_dict().items()}, qformer.width
        hidden = _shape(checkpoint, "language_proj.weight", 2)[0]
        norm, projection = torch.nn.LayerNorm(width), torch.nn.Linear(inner, hidden)
        state |= {f"ln_vision.{name}": value for name, value in norm.state_dict().items()}
        if settings.image_places:
            state[IMAGE_PLACES] = torch.empty(settings.image_places, hidden)
        return state | {f"language_proj.{name}": value for name, value in projection.state_dict().items()}


def _bert(checkpoint: Checkpoint) -> Any:
    """Sizes of its Q-Former: of the BERT that it names where that one's config is at hand, else as its tensors are."""
    from transformers import BertConfig

    init = checkpoint.config.qformer.init
    if init in TOWERS or Path(init).is_dir():
        return bert_config(init, weights=False)
    text = checkpoint.config.stage == "stage1" or checkpoint.config.qformer.instruction is not None
    return BertConfig(
        hidden_size=_shape(checkpoint, "qformer.query_tokens", 2)[1],
        num_hidden_layers=names.depth_of(checkpoint.tensors),
        num_attention_heads=1,
        intermediate_size=_shape(checkpoint, "qformer.layers.0.query_ff.up.weight", 2)[0],
        vocab_size=_shape(checkpoint, "qformer.embeddings.word.weight", 2)[0] - EXTRA_TOKENS if text else 1,
        max_position_embeddings=_shape(checkpoint, "qformer.embeddings.position.weight", 2)[0] if text else 1,
    )


def _shape(checkpoint: Checkpoint, name: str, axes: int) -> tuple[int, ...]:
    lazy = checkpoint.tensors.get(name)
    if lazy is None:
        raise CheckpointError(f"{checkpoint.source}: {name} is missing: the checkpoint is of another model or stage")
    if len(lazy.shape) != axes:
        raise CheckpointError(f"{checkpoint.source}: {name} has {len(lazy.shape)} axes, not {axes}")
    return lazy.shape
