"""Reading the soft prompts of an image once for all of its texts, with gradients.

A causal model's keys and values of the soft prompts do not depend on what follows: the texts about
an image differ only behind them. `generation.prefill` does the same for generation, in place and
without gradients.

Shape letters: B images, N texts, T text tokens, S tokens of a prefix, H width of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from blip2.models.generation.prefill import can_widen, is_plain


@dataclass(frozen=True)
class Prefix:
    """What a decoder has read of B images.

    Args:
        past: its cache, part of the graph.
        last: hidden state [B, H] behind the last token, which predicts the first of a text.
        length: S, tokens read.
    """

    past: Any
    last: Tensor
    length: int


def read(decoder: Any, embeds_BSH: Tensor) -> Prefix | None:
    """Read prefixes without padding; None where the model keeps them in a form that texts cannot share."""
    out = decoder(inputs_embeds=embeds_BSH, use_cache=True)
    past = getattr(out, "past_key_values", None)
    if not can_widen(past) or not is_plain(past) or not isinstance(past, DynamicCache):
        return None
    return Prefix(past, out.last_hidden_state[:, -1], embeds_BSH.shape[1])


def states_before(decoder: Any, prefix: Prefix, rows_N: Tensor, embeds_NTH: Tensor, mask_NT: Tensor) -> Tensor:
    """Hidden states [N, T, H] that predict each token of N texts.

    Args:
        rows_N: the prefix that each text continues.
        mask_NT: 1 or True on real tokens, which stand on the left.
    """
    before_NS = torch.ones(len(rows_N), prefix.length, dtype=torch.int64, device=mask_NT.device)
    mask_NS = torch.cat([before_NS, mask_NT.to(torch.int64)], dim=1)
    out = decoder(
        inputs_embeds=embeds_NTH, attention_mask=mask_NS, past_key_values=_rows(prefix.past, rows_N), use_cache=True
    )
    return torch.cat([prefix.last[rows_N].unsqueeze(1), out.last_hidden_state[:, :-1]], dim=1)


def common_lead(ids_NT: Tensor, mask_NT: Tensor, labels_NT: Tensor) -> int:
    """How many leading tokens all texts share and none has to predict; at least one token stays behind them."""
    same_T = (ids_NT == ids_NT[:1]).all(dim=0) & mask_NT.bool().all(dim=0) & ~labels_NT.any(dim=0)
    return min(int(same_T.to(torch.int64).cumprod(dim=0).sum()), ids_NT.shape[1] - 1)


def _rows(past: Any, rows_N: Tensor) -> DynamicCache:
    """A cache of these rows, with repeats; what is appended to it stays out of `past`."""
    out = DynamicCache()
    for layer in past.layers:
        rows = DynamicLayer()
        rows.keys, rows.values = layer.keys[rows_N], layer.values[rows_N]
        rows.dtype, rows.device, rows.is_initialized = layer.keys.dtype, layer.keys.device, True
        out.layers.append(rows)
    return out
