"""Start a Q-Former from any BERT-type checkpoint: sizes, weights, vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.errors import CheckpointError
from blip2.models.qformer.model import QFormer

_POSITIONS, _TYPES = "embeddings.position.weight", "embeddings.token_type_embeddings.weight"
# Parts of BERT that a Q-Former has no use for, and the only ones that may be left over.
_UNUSED = ("pooler.", "embeddings.position_ids", _TYPES, "cls.seq_relationship.")
_HEAD = {
    "head.dense.weight": "transform.dense.weight",
    "head.dense.bias": "transform.dense.bias",
    "head.norm.weight": "transform.LayerNorm.weight",
    "head.norm.bias": "transform.LayerNorm.bias",
    "head.bias": "bias",
}
# Tensors with a row per word: the Q-Former's may have more ([DEC]).
_BY_VOCABULARY = ("embeddings.word.weight", "head.bias")


def load_bert(qformer: QFormer, state: dict[str, Tensor], source: str) -> list[str]:
    """Copy a BERT checkpoint into a Q-Former, in place and strictly.

    Self-attention and feed-forwards are copied, the query feed-forwards as a copy of the text's.
    The constant first token type is added to the positions, so that the text branch alone
    computes what BERT does. New rows of the vocabulary ([DEC]), the cross-attention, the query
    tokens and a missing prediction head keep their initialisation.

    Args:
        state: tensors of `BertModel` or `BertForMaskedLM`.
        source: name for error messages.

    Returns:
        Names of the Q-Former's tensors that kept their initialisation.

    Raises:
        CheckpointError: a tensor of BERT is missing, has another shape, or has no place.
    """
    values = text_tensors(qformer.depth, state, source)
    used = {key for _, key in _names(qformer.depth)}
    rest = {name: value for key, value in state.items() if (name := key.removeprefix("bert.")) not in used}
    own = dict(qformer.named_parameters())
    filled = set()

    def put(name: str, value: Tensor) -> None:
        target = own[name]
        rows = value.shape[0]
        fits = rows <= target.shape[0] if name in _BY_VOCABULARY else rows == target.shape[0]
        if target.shape[1:] != value.shape[1:] or not fits:
            raise CheckpointError(f"{source}: {name} is {tuple(value.shape)}, the Q-Former needs {tuple(target.shape)}")
        with torch.no_grad():
            target[:rows].copy_(value)
        filled.add(name)

    for name, value in values.items():
        if name in own:  # without a text branch only the query side is there to fill
            put(name, value)
        if ".text_ff." in name:
            put(name.replace(".text_ff.", ".query_ff."), value)
    if qformer.head is not None and "cls.predictions.bias" in rest:
        for name, key in _HEAD.items():
            put(name, _require(rest, f"cls.predictions.{key}", source))
    extra = [k for k in rest if not k.startswith(_UNUSED) and not k.startswith("cls.predictions")]
    if extra:
        raise CheckpointError(f"{source}: {extra[0]} has no place in a Q-Former, so it is not a BERT-type checkpoint")
    return sorted(set(own) - filled)


def text_tensors(depth: int, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A text branch that computes what BERT does, by the Q-Former's names; without rows for new words.

    Args:
        depth: layers.
        state: tensors of `BertModel` or `BertForMaskedLM`.
        source: name for error messages.

    Raises:
        CheckpointError: a tensor of BERT is missing.
    """
    theirs = {key.removeprefix("bert."): value for key, value in state.items()}
    out = {name: _require(theirs, key, source) for name, key in _names(depth)}
    if _TYPES in theirs:
        out[_POSITIONS] = out[_POSITIONS] + theirs[_TYPES][0]
    return out


def text_names(depth: int) -> list[str]:
    """The names that `text_tensors` gives."""
    return [name for name, _ in _names(depth)]


def _require(tensors: dict[str, Tensor], key: str, source: str) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"{source}: {key} is missing, so it is not a BERT-type checkpoint")
    return tensors[key]


def _names(depth: int) -> list[tuple[str, str]]:
    """(Q-Former tensor, BERT tensor), for a Q-Former with its text branch."""
    pairs = [("embedding_norm", "embeddings.LayerNorm")]
    for n in range(depth):
        ours, theirs = f"layers.{n}", f"encoder.layer.{n}"
        pairs += [(f"{ours}.self_attention.{p}", f"{theirs}.attention.self.{p}") for p in ("query", "key", "value")]
        pairs += [
            (f"{ours}.self_attention.output", f"{theirs}.attention.output.dense"),
            (f"{ours}.self_attention.norm", f"{theirs}.attention.output.LayerNorm"),
            (f"{ours}.text_ff.up", f"{theirs}.intermediate.dense"),
            (f"{ours}.text_ff.down", f"{theirs}.output.dense"),
            (f"{ours}.text_ff.norm", f"{theirs}.output.LayerNorm"),
        ]
    named = [(f"{o}.{kind}", f"{t}.{kind}") for o, t in pairs for kind in ("weight", "bias")]
    return [
        ("embeddings.word.weight", "embeddings.word_embeddings.weight"),
        ("embeddings.position.weight", "embeddings.position_embeddings.weight"),
        *named,
    ]
