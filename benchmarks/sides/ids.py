"""Texts as token ids, so that every side reads the same tokens and none needs a tokenizer's files.

A text is written as its ids: `"1 732 40 2"`. Torch only: this also runs in the environment of a peer.

Shape letters: B texts, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAD, CLS, SEP = 0, 1, 2


def rows_of(texts: list[str], longest: int) -> list[list[int]]:
    """Ids of each text, cut at `longest`."""
    return [[int(word) for word in text.split()][:longest] for text in texts]


def padded(rows: list[list[int]], length: int | None = None, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and bool mask, to `length` or the longest."""
    length = length or max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), PAD, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.int64)
        mask[number, place] = True
    return ids, mask


class QFormerIds:
    """What `blip2.data.tokenizers.QFormerTokenizer` gives, of texts written as ids."""

    def __init__(self, words: int, max_text: int) -> None:
        self.max_text, self.dec_id, self.pad_id, self.cls_id, self.sep_id = max_text, words, PAD, CLS, SEP
        self.vocab_size = words + 1

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return padded(rows_of(texts, self.max_text))


class LanguageIds:
    """What `blip2.data.tokenizers.LanguageTokenizer` gives for a decoder-only model, of texts written as ids."""

    def __init__(self, end_id: int, max_text: int) -> None:
        self.end_id, self.pad_id, self.max_text, self.encoder_decoder = end_id, PAD, max_text, False

    def prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return padded(rows_of(texts, 1000), left=True)

    def targets(self, prompts: list[str], captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        heads = rows_of(prompts, 1000)
        tails = [[*row, self.end_id] for row in rows_of(captions, self.max_text - 1)]
        ids, mask = padded([head + tail for head, tail in zip(heads, tails, strict=True)])
        starts = torch.tensor([len(head) for head in heads])
        return ids, mask, mask & (torch.arange(ids.shape[1])[None] >= starts[:, None])

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids[: ids.index(self.end_id)] if self.end_id in ids else ids))


# -- what a check of stage 1 compares, by LAVIS's names -------------------------------------------

GRADIENTS = (
    "ln_vision.weight",
    "query_tokens",
    "vision_proj.weight",
    "text_proj.weight",
    "itm_head.weight",
    "Qformer.bert.embeddings.position_embeddings.weight",
    "Qformer.bert.encoder.layer.0.crossattention.self.key.weight",
    "Qformer.bert.encoder.layer.0.attention.self.query.weight",
    "Qformer.bert.encoder.layer.1.intermediate.dense.weight",
    "Qformer.bert.encoder.layer.1.intermediate_query.dense.weight",
    "Qformer.cls.predictions.transform.dense.weight",
)


def fixed_negatives(batch: int) -> tuple[Tensor, Tensor]:
    """A negative text for each image and a negative image for each text, the same on every side."""
    rows = torch.arange(batch)
    return (rows + 1) % batch, (rows + 2) % batch
