"""Small weight files: bf16, and of the word embeddings only the rows that training texts have.

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
    """The tensors of a checkpoint in bf16; of its word embeddings only `rows` and [DEC].

    Args:
        rows: int64, words to keep; None keeps all. Ignored where there is no text branch.

    Raises:
        CheckpointError: the words that are left out are not to be had again from `qformer.init`.
    """
    out = {name: _half(lazy) for name, lazy in found.tensors.items()}
    if rows is None or WORDS not in out:
        return out
    words = out.pop(WORDS)
    vocabulary, width = words.shape
    if _shape(found.config.qformer) != words.shape:
        raise CheckpointError(f"{found.source}: its words are not those of {found.config.qformer.init}: keep all")
    kept = torch.cat([rows, torch.tensor([vocabulary - 1])]).unique()
    out[ROWS] = LazyTensor.of(kept.to(torch.int32))
    out[VALUES] = LazyTensor((len(kept), width), words.dtype, lambda: words.read()[kept])
    return out


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
