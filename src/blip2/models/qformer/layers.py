"""The parts of the Q-Former: packed text, attention, feed-forwards, one layer.

Shape letters: N rows (pairs), B images, Q queries, T text tokens, M real text tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.ops.attention import attention
from blip2.ops.bucketing import bucket

KeyValue = tuple[Tensor, Tensor]


class Packing:
    """Positions of the real tokens of a right-padded batch.

    Args:
        mask_NT: bool, True on real tokens. Columns that are padding in every row are dropped.
        bucketed: pad to one of a few lengths, and treat a batch without padding like all others, so
            that layers are not compiled again and again. The real tokens are the same.

    Attributes:
        longest: tokens of the longest row.
        length: columns T of the padded shape.
    """

    def __init__(self, mask_NT: Tensor, bucketed: bool = False) -> None:
        mask_NT = mask_NT.bool()
        self.longest = max(int(mask_NT.sum(dim=1).max()), 1)
        self.rows, self.length = mask_NT.shape[0], bucket(self.longest) if bucketed else self.longest
        self.mask_NT = self._columns(mask_NT)
        flat = self.mask_NT.reshape(-1).nonzero().squeeze(1)
        self.flat_M = None if flat.numel() == self.mask_NT.numel() and not bucketed else flat

    @property
    def full(self) -> bool:
        """True where nothing is padded."""
        return self.flat_M is None

    def pack(self, x_NT: Tensor) -> Tensor:
        """[N, T, ...] -> [M, ...]: the real tokens."""
        flat = self._columns(x_NT).flatten(0, 1)
        return flat if self.flat_M is None else flat.index_select(0, self.flat_M)

    def unpack(self, x_MD: Tensor) -> Tensor:
        """[M, D] -> [N, T, D], zeros on padding."""
        if self.flat_M is not None:
            x_MD = x_MD.new_zeros(self.rows * self.length, x_MD.shape[-1]).index_copy(0, self.flat_M, x_MD)
        return x_MD.view(self.rows, self.length, -1)

    def mean(self, x_MD: Tensor) -> Tensor:
        """[M, D] -> [N, D]: the mean over each row's real tokens."""
        counts_N1 = self.mask_NT.sum(dim=1, keepdim=True).to(x_MD.dtype)
        return self.unpack(x_MD).sum(dim=1) / counts_N1

    def first(self, x_MD: Tensor) -> Tensor:
        """[M, D] -> [N, D]: the first token of each row ([CLS])."""
        if self.flat_M is None:
            return x_MD.view(self.rows, self.length, -1)[:, 0]
        counts = self.mask_NT.sum(dim=1)
        return x_MD[counts.cumsum(0) - counts]

    def _columns(self, x_NT: Tensor) -> Tensor:
        """[N, any, ...] -> [N, T, ...]: padding is cut off, or added as zeros."""
        missing = self.length - x_NT.shape[1]
        if missing <= 0:
            return x_NT[:, : self.length]
        return torch.cat([x_NT, x_NT.new_zeros(self.rows, missing, *x_NT.shape[2:])], dim=1)


class Attention(nn.Module):
    """Multi-head attention with BERT's residual and LayerNorm after it.

    Args:
        width: of the queries, the output and the residual stream.
        source_width: of what keys and values are made from.
    """

    def __init__(
        self, width: int, heads: int, source_width: int, *, eps: float, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def split(self, x_NLD: Tensor) -> Tensor:
        """[N, L, D] -> [N, heads, L, D / heads]."""
        return x_NLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scaled dot-product attention of split heads -> [N, L, D]."""
        dropout = self.attention_dropout if self.training else 0.0
        return attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)

    def finish(self, residual: Tensor, context: Tensor) -> Tensor:
        """Output projection, dropout, residual, LayerNorm."""
        return self.norm(residual + self.dropout(self.output(context)))


class FeedForward(nn.Module):
    """BERT's feed-forward with exact GELU, residual and LayerNorm after it."""

    def __init__(self, width: int, inner: int, *, eps: float, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class QFormerLayer(nn.Module):
    """Shared self-attention, cross-attention of the queries, one feed-forward per stream."""

    def __init__(self, attention: Attention, cross: Attention | None, query_ff: FeedForward, text_ff: nn.Module | None):
        super().__init__()
        self.self_attention = attention
        self.cross_attention = cross
        self.query_ff = query_ff
        self.text_ff = text_ff

    def queries(self, x_NQD: Tensor, image: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Queries alone; also returns their self-attention keys and values, for ITG."""
        attention = self.self_attention
        key, value = attention.split(attention.key(x_NQD)), attention.split(attention.value(x_NQD))
        context = attention.attend(attention.split(attention.query(x_NQD)), key, value)
        return self._query_rest(attention.finish(x_NQD, context), image), (key, value)

    def text(
        self, x_MD: Tensor, packing: Packing, mask: Tensor | None, before: KeyValue | None = None, first: bool = False
    ) -> Tensor:
        """Text alone, or on the keys/values of queries that stand `before` it.

        Args:
            mask: bool, broadcastable to [N, 1, T, T or Q+T]; None where all see all.
            first: return [N, D], only each row's first token.
        """
        attention = self.self_attention
        assert self.text_ff is not None
        key = attention.split(packing.unpack(attention.key(x_MD)))
        value = attention.split(packing.unpack(attention.value(x_MD)))
        if before is not None:
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        residual = packing.first(x_MD) if first else x_MD
        query = attention.query(residual)
        query = query.unsqueeze(1) if first else packing.unpack(query)
        context = attention.attend(attention.split(query), key, value, mask)
        x = attention.finish(residual, context.squeeze(1) if first else packing.pack(context))
        out: Tensor = self.text_ff(x)
        return out

    def pair(
        self,
        x_NQD: Tensor,
        x_MD: Tensor,
        packing: Packing,
        mask: Tensor | None,
        image: KeyValue | None,
        last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Queries and text, all see all; in the `last` layer text only gives keys and values."""
        attention, queries = self.self_attention, x_NQD.shape[1]
        key = torch.cat([attention.key(x_NQD), packing.unpack(attention.key(x_MD))], dim=1)
        value = torch.cat([attention.value(x_NQD), packing.unpack(attention.value(x_MD))], dim=1)
        query = attention.query(x_NQD)
        if not last:
            query = torch.cat([query, packing.unpack(attention.query(x_MD))], dim=1)
        context = attention.attend(attention.split(query), attention.split(key), attention.split(value), mask)
        x_NQD = self._query_rest(attention.finish(x_NQD, context[:, :queries]), image)
        if not last:
            assert self.text_ff is not None
            x_MD = self.text_ff(attention.finish(x_MD, packing.pack(context[:, queries:])))
        return x_NQD, x_MD

    def _query_rest(self, x_NQD: Tensor, image: KeyValue | None) -> Tensor:
        if self.cross_attention is not None:
            assert image is not None
            x_NQD = self._cross(x_NQD, *image)
        out: Tensor = self.query_ff(x_NQD)
        return out

    def _cross(self, x_NQD: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Cross-attention of N = R x B rows to B images: row n attends to image n mod B.

        Rows of one image become more queries of it, so that its keys and values are never copied.
        """
        cross = self.cross_attention
        assert cross is not None
        images, (N, Q, D) = key.shape[0], x_NQD.shape
        query = cross.query(x_NQD)
        if images != N:
            query = query.view(N // images, images, Q, D).transpose(0, 1).reshape(images, -1, D)
        context = cross.attend(cross.split(query), key, value)
        if images != N:
            context = context.view(images, N // images, Q, D).transpose(0, 1).reshape(N, Q, D)
        return cross.finish(x_NQD, context)
