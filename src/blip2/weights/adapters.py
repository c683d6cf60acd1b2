"""LoRA adapters of a checkpoint folded into its language model, one tensor at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from blip2.configs import LoraConfig
from blip2.errors import CheckpointError
from blip2.models.freezing import is_adapter
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.frozen_towers import Tower, empty_language_model
from blip2.weights.lazy_tensors import LazyTensor
from blip2.weights.loading import QFORMER

# Where a run keeps its language model, and how peft names the first of the two matrices.
_PREFIX, _FIRST, _SECOND = "language_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"


def has_adapters(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds LoRA adapters."""
    return any(map(is_adapter, checkpoint.tensors))


def with_merged_qformer(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose Q-Former has its adapters added to its weights, when they are read; others as they are."""
    lora = checkpoint.config.lora
    if not lora.qformer_rank:
        return checkpoint
    tensors, scale = dict(checkpoint.tensors), lora.alpha / lora.qformer_rank
    for name in [name for name in tensors if name.startswith(QFORMER) and name.endswith(".lora_A")]:
        layer = name.removesuffix(".lora_A")
        first, second = tensors.pop(name), tensors.pop(f"{layer}.lora_B")
        tensors[f"{layer}.weight"] = _sum(tensors[f"{layer}.weight"], first, second, scale, transpose=False)
    config = replace(checkpoint.config, lora=replace(lora, qformer_rank=0))
    return replace(checkpoint, config=config, tensors=tensors)


def without_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint as if it had never had adapters, nor a quantized language model beside them."""
    language = replace(checkpoint.config.language, quantize=None)
    config = replace(checkpoint.config, lora=LoraConfig(), language=language)
    return replace(
        checkpoint, config=config, tensors={n: t for n, t in checkpoint.tensors.items() if not is_adapter(n)}
    )


def merged(language: Tower, checkpoint: Checkpoint) -> Tower:
    """The language model of a checkpoint with its adapters added to its weights, when they are read.

    Sums in float32 and rounds once to the dtype of the weight, as `blip2.models.language.lora.merge_lora`.

    Raises:
        CheckpointError: an adapter stands beside a layer that the language model does not have.
    """
    tensors, scale = dict(language.tensors), checkpoint.config.lora.alpha / checkpoint.config.lora.rank
    transposed = _transposed_layers(language.config)
    for name, first in checkpoint.tensors.items():
        if not name.endswith(_FIRST):
            continue
        layer = name.removeprefix(_PREFIX).removesuffix(_FIRST)
        second, weight = checkpoint.tensors[name.removesuffix(_FIRST) + _SECOND], tensors.get(f"{layer}.weight")
        if weight is None:
            raise CheckpointError(
                f"{checkpoint.source}: its adapter {layer} has no layer in {checkpoint.config.language.name}"
            )
        tensors[f"{layer}.weight"] = _sum(weight, first, second, scale, transpose=layer in transposed)
    return Tower(language.config, tensors, language.folder)


def _sum(weight: LazyTensor, first: LazyTensor, second: LazyTensor, scale: float, *, transpose: bool) -> LazyTensor:
    def read() -> Tensor:
        product = scale * (second.read().float() @ first.read().float())
        return (weight.read().float() + (product.T if transpose else product)).to(weight.dtype)

    return LazyTensor(weight.shape, weight.dtype, read)


def _transposed_layers(config: Any) -> set[str]:
    """Layers that keep their weight as [in, out] (GPT-2's Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in empty_language_model(config).named_modules() if isinstance(module, Conv1D)}
