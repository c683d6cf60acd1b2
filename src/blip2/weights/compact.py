"""Small weight files: bf16, without what is as it was in the checkpoint that the Q-Former started from.

Word embeddings are over a third of a small stage 1, and most words are in no training text: only the rows that
training changed are kept. A text branch that was not trained (`qformer.lock_text`) is left out. When the file is
opened, what is left out is taken from that checkpoint again.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from blip2.configs import QFormerConfig
from blip2.errors import CheckpointError
from blip2.models.build import EXTRA_TOKENS, bert_config, bert_text
from blip2.models.qformer.bert_init import text_names
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.lazy_tensors import LazyTensor, Tensors

_WORDS = "embeddings.word.weight"
WORDS = f"qformer.{_WORDS}"
ROWS, VALUES = "qformer.embeddings.word.rows", "qformer.embeddings.word.values"


def shrink(checkpoint: Checkpoint, rows: Tensor | None) -> Tensors:
    """The tensors of a checkpoint in bf16, without what its text branch started from.

    Args:
        rows: int64, keep no other words than these and [DEC]; None keeps all that training changed. Ignored
            where there is no text branch.
    """
    out = {name: _in_bf16(lazy) for name, lazy in checkpoint.tensors.items()}
    words, config = checkpoint.tensors.get(WORDS), checkpoint.config.qformer
    if words is None or _shape(config) != words.shape:
        return out
    start = bert_text(config.init)
    if config.lock_text:
        out = {name: lazy for name, lazy in out.items() if not _unchanged(name, checkpoint.tensors[name], start)}
    del out[WORDS]
    changed = _changed_rows(words.read().float(), start[_WORDS])
    kept_rows = changed if rows is None else changed[torch.isin(changed, torch.cat([rows, changed[-1:]]))]
    out[ROWS] = LazyTensor.of(kept_rows.to(torch.int32))
    out[VALUES] = LazyTensor(
        (len(kept_rows), words.shape[1]), torch.bfloat16, lambda: words.read()[kept_rows].to(torch.bfloat16)
    )
    return out


def _unchanged(name: str, lazy: LazyTensor, start: dict[str, Tensor]) -> bool:
    before = start.get(name.removeprefix("qformer."))
    return before is not None and before.shape == lazy.shape and torch.equal(lazy.read().float(), before)


def _changed_rows(words: Tensor, before: Tensor) -> Tensor:
    """Rows that are not what they began as, [DEC] last among them."""
    same = torch.zeros(len(words), dtype=torch.bool)
    same[: len(before)] = (words[: len(before)] == before).all(dim=1)
    return (~same).nonzero()[:, 0]


def restore(tensors: Tensors, config: QFormerConfig, source: str) -> Tensors:
    """Tensors as they were before `shrink`, those that were left out from `config.init`; others as they are.

    Raises:
        CheckpointError: a row that the vocabulary does not have.
    """
    if ROWS not in tensors:
        return tensors
    stored = {name: lazy for name, lazy in tensors.items() if name not in (ROWS, VALUES)}
    shape, values = _shape(config), tensors[VALUES]
    rows = tensors[ROWS].read().long()
    if values.shape != (len(rows), shape[1]) or bool(((rows < 0) | (rows >= shape[0])).any()):
        raise CheckpointError(f"{source}: its rows of words do not fit the {shape[0]} words of {config.init}")
    start = functools.cache(lambda: bert_text(config.init))

    def read() -> Tensor:
        out = torch.zeros(shape)
        words = start()[_WORDS]
        out[: len(words)] = words
        out[rows] = values.read().float()
        return out

    out = stored | {WORDS: LazyTensor(shape, torch.float32, read)}
    if config.lock_text:
        depth = bert_config(config.init, weights=False).num_hidden_layers
        absent = [name for name in text_names(depth) if f"qformer.{name}" not in out]
        out |= {f"qformer.{name}": LazyTensor.of(start()[name]) for name in absent}
    return out


def _shape(config: QFormerConfig) -> tuple[int, int]:
    bert = bert_config(config.init, weights=False)
    return bert.vocab_size + EXTRA_TOKENS, bert.hidden_size


def _in_bf16(lazy: LazyTensor) -> LazyTensor:
    if lazy.dtype not in (torch.float32, torch.float64) or lazy.nbytes <= lazy.dtype.itemsize:
        return lazy  # the temperature stays exact
    return LazyTensor(lazy.shape, torch.bfloat16, lambda: lazy.read().to(torch.bfloat16))
