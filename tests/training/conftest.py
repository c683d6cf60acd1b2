"""Small models, tokenizers and batches that the tests of training share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, T5Config

from blip2.data.batch import Batch
from blip2.models.language.model import language_model_from_config
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2

WORDS = [
    "a",
    "dog",
    "runs",
    "through",
    "the",
    "green",
    "grass",
    "near",
    "two",
    "men",
    "on",
    "some",
    "old",
    "bikes",
    "of",
    "them",
]
C, P, Q = 6, 5, 3
SIZES: dict[str, Any] = {"width": 8, "depth": 3, "heads": 2, "inner": 12, "image_width": C, "queries": Q}


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids, ids > 0


class WordTokenizer:
    """Whole words of a closed vocabulary, for the Q-Former and for language models of both kinds."""

    pad_id, cls_id, sep_id, dec_id, end_id = 0, 1, 2, 3, 2
    vocab = 4 + len(WORDS)

    def plain(self, text: str) -> list[int]:
        return [4 + WORDS.index(word) for word in text.split()]

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return padded([[self.cls_id, *self.plain(text), self.sep_id] for text in texts])

    def targets(self, prompts: list[str], captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        heads = [[self.cls_id, *self.plain(prompt)] for prompt in prompts]
        tails = [[*self.plain(caption), self.end_id] for caption in captions]
        ids, mask = padded([h + t for h, t in zip(heads, tails, strict=True)])
        labels = mask & (torch.arange(ids.shape[1]) >= torch.tensor([len(h) for h in heads])[:, None])
        return ids, mask, labels

    def pairs(self, prefixes: list[str], suffixes: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ends = [[[*self.plain(text), self.end_id] for text in texts] for texts in (prefixes, suffixes)]
        return *padded(ends[0]), *padded(ends[1])


class Tiny:
    """Makers of everything a training test needs; all random, seeded by torch's generator."""

    tokenizer = WordTokenizer()

    def qformer(self, *, text: bool = True, dropout: float = 0.0) -> QFormer:
        """A Q-Former with weights large enough that every part matters."""
        made = QFormer(
            **SIZES,
            vocab=self.tokenizer.vocab if text else None,
            positions=20,
            dropout=dropout,
            attention_dropout=dropout,
        )
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return made

    def stage1(self, dropout: float = 0.0, vision: Any = None) -> Stage1:
        return Stage1(self.qformer(dropout=dropout), vision, embed_dim=4, temperature=0.2)

    def stage2(self, kind: str = "llama", dropout: float = 0.0) -> Stage2:
        sizes: dict[str, Any] = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config: Any
        if kind == "llama":
            sizes |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = LlamaConfig(**sizes, initializer_range=0.3)
        else:
            sizes |= {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
            config = T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
        return Stage2(self.qformer(text=False, dropout=dropout), language_model_from_config(config))

    def batch(self, size: int, seed: int = 0, image_ids: list[int] | None = None) -> Batch:
        """Pairs with features and captions of 1 to 7 words; the same for the same seed."""
        g = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, 9, (size,), generator=g).tolist()
        counts = torch.randint(1, 8, (size,), generator=g).tolist()
        captions = [" ".join(WORDS[start : start + count]) for start, count in zip(starts, counts, strict=True)]
        ids = torch.arange(size) if image_ids is None else torch.tensor(image_ids)
        keys = [f"photo{seed}-{n}" for n in range(size)]
        return Batch(keys, ids, captions, features=torch.randn(size, P, C, generator=g))


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()
