"""Small weight files: bf16, and of the word embeddings only the rows that training moved.

Words are over a third of a small stage-1 bridge, and most of them no training text has. Their rows are
left out, and are again those of the checkpoint that the Q-Former started from when the file is opened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.configs import QFormerConfig
from blip2.errors import CheckpointError
from blip2.models.build import EXTRA_TOKENS, bert_config, bert_words
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.tensors import LazyTensor, Tensors

WORDS = "qformer.embeddings.word.weight"
ROWS, VALUES = "qformer.embeddings.word.rows", "qformer.embeddings.word.values"


def slim(found: Checkpoint, rows: Tensor | None) -> Tensors:
    """The tensors of a checkpoint in bf16; of its word embeddings only those that training moved.

    Args:
        rows: int64, keep no other words than these and [DEC]; None keeps all that moved. Ignored
            where there is no text branch.
    """
    out = {name: _half(lazy) for name, lazy in found.tensors.items()}
    words = found.tensors.get(WORDS)
    if words is None or _shape(found.config.qformer) != words.shape:
        return out
    del out[WORDS]
    moved = _moved(words.read().float(), bert_words(found.config.qformer.init))
    kept = moved if rows is None else moved[torch.isin(moved, torch.cat([rows, moved[-1:]]))]
    out[ROWS] = LazyTensor.of(kept.to(torch.int32))
    out[VALUES] = LazyTensor((len(kept), words.shape[1]), torch.bfloat16, lambda: words.read()[kept].to(torch.bfloat16))
    return out


def _moved(words: Tensor, before: Tensor) -> Tensor:
    """Rows that are not what they began as, [DEC] last among them."""
    same = torch.zeros(len(words), dtype=torch.bool)
    same[: len(before)] = (words[: len(before)] == before).all(dim=1)
    return (~same).nonzero()[:, 0]


def whole(tensors: Tensors, config: QFormerConfig, source: str) -> Tensors:
    """Tensors as they were before `slim`, words that were left out from `config.init`; others as they are.

    Raises:
        CheckpointError: a row that the vocabulary does not have.
    """
    if ROWS not in tensors:
        return tensors
    left = {name: lazy for name, lazy in tensors.items() if name not in (ROWS, VALUES)}
    shape, values = _shape(config), tensors[VALUES]
    rows = tensors[ROWS].read().long()
    if values.shape != (len(rows), shape[1]) or bool(((rows < 0) | (rows >= shape[0])).any()):
        raise CheckpointError(f"{source}: its rows of words do not fit the {shape[0]} words of {config.init}")

    def read() -> Tensor:
        out = torch.zeros(shape)
        words = bert_words(config.init)
        out[: len(words)] = words
        out[rows] = values.read().float()
        return out

    return left | {WORDS: LazyTensor(shape, torch.float32, read)}


def _shape(config: QFormerConfig) -> tuple[int, int]:
    bert = bert_config(config.init, weights=False)
    return bert.vocab_size + EXTRA_TOKENS, bert.hidden_size


def _half(lazy: LazyTensor) -> LazyTensor:
    if lazy.dtype not in (torch.float32, torch.float64) or lazy.nbytes <= lazy.dtype.itemsize:
        return lazy  # the temperature stays exact
    return LazyTensor(lazy.shape, torch.bfloat16, lambda: lazy.read().to(torch.bfloat16))
