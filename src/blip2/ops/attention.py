"""Scaled dot-product attention in the form that is fast where it runs.

PyTorch's fused kernel is the best there is on a GPU, in float32 and without gradients. Its backward pass in bfloat16
on a CPU is not: ms of forward and backward, one thread of a Xeon with AMX, 2026-12-01, by (N, h, L, S, D):

| shape | fused | products |
|---|---|---|
| 64, 12, 16, 16, 32 | 60.0 | 8.2 |
| 64, 12, 16, 58, 32 | 75.9 | 17.3 |
| 64, 12, 30, 30, 32 | 86.7 | 25.7 |
| 16, 12, 32, 257, 64 | 45.1 | 39.5 |
| 16, 12, 64, 64, 64 | 41.5 | 13.3 |
| 24, 9, 45, 45, 64 | 45.9 | 11.5 |
| 8, 16, 257, 257, 64 | 109.9 | 73.3 |
| 4, 12, 512, 512, 64 | 123.6 | 142.8 |

Shape letters: N rows, h heads, L queries, S keys, D width of a head.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Scores of a row and head up to which plain products win.
_FEW_SCORES = 400 * 400


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: [N, h, L, D] of q [N, h, L, D] and k, v [N, h, S, D].

    Args:
        mask: bool, broadcastable to [N, h, L, S], True where a query may attend to a key; every query to at least one.
        dropout: share of the attention weights that is dropped.
    """
    if not _products_win(q, k):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    return torch.matmul(F.dropout(weights, dropout) if dropout else weights, v)


def fast_kernels(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """For models that call PyTorch's attention themselves: its plain form where a backward pass will follow.

    Args:
        x: what the model is given, [N, L, any].
    """
    if _bf16_backward(x) and x.shape[1] ** 2 <= _FEW_SCORES:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def _products_win(q: Tensor, k: Tensor) -> bool:
    return (_bf16_backward(q) or _bf16_backward(k)) and q.shape[-2] * k.shape[-2] <= _FEW_SCORES


def _bf16_backward(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.requires_grad and torch.is_grad_enabled()
