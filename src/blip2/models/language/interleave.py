"""Several images and their texts in one sequence, for a language model that learns from examples in its context.

A sequence is soft prompts of image 1, text 1, soft prompts of image 2, text 2, and so on, each text with
its end token behind it (Flamingo, arXiv 2204.14198, section 2.4, calls that token <EOC>).

Shape letters: N segments (an image and its text each), B sequences, K segments of a sequence (N = B x K),
Q queries (soft prompts), T text tokens, S tokens of a sequence, H width of the input embeddings, M targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.models.language.model import LanguageModel


@dataclass(frozen=True)
class Interleaved:
    """Sequences of images and texts, padded at the right edge only.

    Args:
        embeds: [B, S, H], input embeddings of soft prompts and text.
        mask: int64 [B, S], 1 on real tokens.
        ids: int64 [B, S]; meaningless at soft prompts and padding.
        labels: bool [B, S], True on the text tokens to predict.
    """

    embeds: Tensor
    mask: Tensor
    ids: Tensor
    labels: Tensor


def interleave(
    language_model: LanguageModel,
    prompt_NQH: Tensor,
    ids_NT: Tensor,
    mask_NT: Tensor,
    labels_NT: Tensor,
    length: int,
    *,
    front: int = 0,
) -> Interleaved:
    """Join every `length` segments that follow each other into one sequence.

    Args:
        prompt_NQH: soft prompts of each segment's image.
        ids_NT, mask_NT, labels_NT: its text, right-padded, and the tokens of it to predict.
        length: segments of a sequence, K.
        front: tokens in front of every separate text (OPT's `</s>`), kept in the first text of a sequence only.
    """
    text_NTH = language_model.embed(ids_NT)
    keep_NT = mask_NT.to(torch.int64)
    if front:
        inner_N = torch.arange(len(ids_NT), device=ids_NT.device) % length > 0
        keep_NT = keep_NT.clone()
        keep_NT[:, :front] *= (~inner_N).to(torch.int64)[:, None]
    queries_NQ = keep_NT.new_ones(prompt_NQH.shape[:2])
    embeds = torch.cat([prompt_NQH.to(text_NTH.dtype), text_NTH], dim=1)
    mask = torch.cat([queries_NQ, keep_NT], dim=1)
    ids = torch.cat([torch.zeros_like(queries_NQ), ids_NT], dim=1)
    labels = torch.cat([torch.zeros_like(queries_NQ, dtype=torch.bool), labels_NT.bool() & keep_NT.bool()], dim=1)
    embeds, mask, ids, labels = (x.unflatten(0, (-1, length)).flatten(1, 2) for x in (embeds, mask, ids, labels))
    order_BS = torch.argsort(mask, dim=1, stable=True, descending=True)[:, : int(mask.sum(dim=1).max())]
    embeds = embeds.gather(1, order_BS[..., None].expand(-1, -1, embeds.shape[-1]))
    return Interleaved(embeds, mask.gather(1, order_BS), ids.gather(1, order_BS), labels.gather(1, order_BS))


def interleaved_loss(language_model: LanguageModel, sequences: Interleaved) -> Tensor:
    """Mean cross-entropy of every labelled token, in float32; decoder-only.

    A token is predicted at the place in front of it: the first of a text by its image's last soft prompt.
    """
    at_BS = torch.zeros_like(sequences.labels)
    at_BS[:, :-1] = sequences.labels[:, 1:]
    targets_M = sequences.ids[sequences.labels]
    return language_model.losses_at(sequences.embeds, sequences.mask, at_BS, targets_M).mean()
