"""Text from images: through the language model (stage 2), or from the Q-Former itself (stage 1).

Shape letters: B images, Q queries, L new tokens, H language-model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.configs import DecodingConfig
from blip2.models.language.model import LanguageModel
from blip2.models.qformer.model import ImageKV, QFormer
from blip2.ops.host import to_list


@torch.no_grad()
def generate(
    language_model: LanguageModel,
    prompts_BQH: Tensor,
    ids_BT: Tensor,
    mask_BT: Tensor,
    config: DecodingConfig,
    *,
    end_id: int,
    pad_id: int,
    images_B: Tensor | None = None,
) -> Tensor:
    """New token ids [B x config.num, L] after soft prompts and a left-padded text prompt.

    Args:
        images_B: the row of `prompts_BQH` that each text is about, where several are about one.
    """
    return language_model.generate(
        prompts_BQH,
        ids_BT,
        mask_BT,
        beams=1 if config.sample else config.beams,
        num_return=config.num,
        min_tokens=config.min_tokens,
        max_tokens=config.max_tokens,
        length_penalty=config.length_penalty,
        end_id=end_id,
        pad_id=pad_id,
        sample=config.sample,
        top_p=config.top_p,
        temperature=config.temperature,
        repetition_penalty=config.repetition_penalty,
        images_B=images_B,
    )


@torch.no_grad()
def generate_with_qformer(
    qformer: QFormer, image_kv: ImageKV, *, dec_id: int, end_id: int, min_tokens: int = 5, max_tokens: int = 24
) -> list[list[int]]:
    """Greedy ITG captions: what the Q-Former alone says of B images, before any language model.

    Returns:
        Token ids per image, without [DEC] and the end token.
    """
    _, cache = qformer.encode_queries(image_kv)
    B = len(image_kv)
    device = qformer.query_tokens.device
    ids = torch.full((B, 1), dec_id, dtype=torch.int64, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for length in range(max_tokens):
        at = torch.zeros_like(ids, dtype=torch.bool)
        at[:, -1] = True
        logits = qformer.decode_text(ids, torch.ones_like(at), cache, at)
        if length < min_tokens:
            logits[:, end_id] = -torch.inf
        token = logits.argmax(dim=-1).masked_fill(ended, end_id)
        ended |= token == end_id
        ids = torch.cat([ids, token[:, None]], dim=1)
        if bool(ended.all()):
            break
    return [row[: row.index(end_id)] if end_id in row else row for row in to_list(ids[:, 1:])]
