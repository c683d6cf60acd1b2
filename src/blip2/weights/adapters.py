"""LoRA adapters of a checkpoint folded into its language model, one tensor at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blip2.configs import LoraConfig
from blip2.errors import CheckpointError
from blip2.models import towers
from blip2.models.freezing import is_adapter
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.frozen_towers import Tower
from blip2.weights.lazy_tensors import LazyTensor

# Where a run keeps its language model, and how peft names the first of the two matrices.
_PREFIX, _FIRST, _SECOND = "language_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"


def has_adapters(found: Checkpoint) -> bool:
    """Whether a checkpoint holds LoRA adapters."""
    return any(map(is_adapter, found.tensors))


def without_adapters(found: Checkpoint) -> Checkpoint:
    """A checkpoint as if it had never had adapters, nor a quantized language model beside them."""
    language = replace(found.config.language, quantize=None)
    config = replace(found.config, lora=LoraConfig(), language=language)
    return replace(found, config=config, tensors={n: t for n, t in found.tensors.items() if not is_adapter(n)})


def merged(language: Tower, found: Checkpoint) -> Tower:
    """The language model of a checkpoint with its adapters added to its weights, when they are read.

    Sums in float32 and rounds once to the dtype of the weight, as `blip2.models.language.lora.merge_lora`.

    Raises:
        CheckpointError: an adapter stands beside a layer that the language model does not have.
    """
    tensors, scale = dict(language.tensors), found.config.lora.alpha / found.config.lora.rank
    turned = _turned(language.config)
    for name, first in found.tensors.items():
        if not name.endswith(_FIRST):
            continue
        layer = name.removeprefix(_PREFIX).removesuffix(_FIRST)
        second, weight = found.tensors[name.removesuffix(_FIRST) + _SECOND], tensors.get(f"{layer}.weight")
        if weight is None:
            raise CheckpointError(f"{found.source}: its adapter {layer} has no layer in {found.config.language.name}")
        tensors[f"{layer}.weight"] = _sum(weight, first, second, scale, turn=layer in turned)
    return Tower(language.config, tensors, language.folder)


def _sum(weight: LazyTensor, first: LazyTensor, second: LazyTensor, scale: float, *, turn: bool) -> LazyTensor:
    def read() -> Tensor:
        product = scale * (second.read().float() @ first.read().float())
        return (weight.read().float() + (product.T if turn else product)).to(weight.dtype)

    return LazyTensor(weight.shape, weight.dtype, read)


def _turned(config: Any) -> set[str]:
    """Layers that keep their weight as [in, out] (GPT-2's Conv1D)."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.pytorch_utils import Conv1D

    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"), towers.quiet():
        model = kind.from_config(config)
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
