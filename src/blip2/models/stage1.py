"""Stage 1: a frozen image encoder, the Q-Former and the heads of ITC and ITM.

Shape letters: B images, N pairs, Q queries, T text tokens, P patches, C image-encoder channels,
D Q-Former width, E contrastive width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.models.qformer.layers import KeyValue
from blip2.models.qformer.model import ImageKV, QFormer
from blip2.ops.devices import widened, without_autocast


class Stage1(nn.Module):
    """Representation learning model (arXiv 2301.12597, section 3.2).

    Args:
        qformer: with its text branch.
        vision: frozen image encoder; None where features come from a cache.
        embed_dim: contrastive width E.
        temperature: start of the learned temperature, which divides similarities.
        norm_eps: of `ln_vision`.
    """

    def __init__(
        self,
        qformer: QFormer,
        vision: nn.Module | None = None,
        *,
        embed_dim: int = 256,
        temperature: float = 0.07,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if qformer.embeddings is None:
            raise ValueError("stage 1 needs a Q-Former with its text branch")
        self.vision = vision
        self.ln_vision = nn.LayerNorm(qformer.image_width, eps=norm_eps)
        self.qformer = qformer
        self.vision_proj = nn.Linear(qformer.width, embed_dim)
        self.text_proj = nn.Linear(qformer.width, embed_dim)
        self.itm_head = nn.Linear(qformer.width, 2)
        # One axis of length one: FSDP2 cannot shard a scalar.
        self.temp = nn.Parameter(torch.tensor([temperature]))

    @property
    def itc_scale(self) -> float:
        """1 / temperature: what ITC multiplies cosines by in training."""
        return 1 / float(self.temp.detach())

    def project_image(self, features_BPC: Tensor) -> ImageKV:
        """Normalise and project image features once for every later pass."""
        return self.qformer.project_image(features_BPC, self.ln_vision)

    def embed_images(self, image_kv: ImageKV) -> tuple[Tensor, list[KeyValue]]:
        """Unit-norm query embeddings [B, Q, E], and the query cache that ITG decodes on."""
        queries_BQD, cache = self.qformer.encode_queries(image_kv)
        return self.image_embeddings(queries_BQD), cache

    def image_embeddings(self, queries_BQD: Tensor) -> Tensor:
        """Unit-norm embeddings [B, Q, E] of query outputs, float32."""
        return F.normalize(_in_float32(self.vision_proj, queries_BQD), dim=-1)

    def embed_texts(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Unit-norm text embeddings [N, E], float32."""
        return F.normalize(_in_float32(self.text_proj, self.qformer.encode_text(ids_NT, mask_NT)), dim=-1)

    def match_logits(self, ids_NT: Tensor, mask_NT: Tensor, image_kv: ImageKV) -> Tensor:
        """ITM logits [N, 2], class 1 a match, float32; text n is paired with image n mod B."""
        return self.pair_logits(self.qformer.encode_pair(ids_NT, mask_NT, image_kv))

    def pair_logits(self, queries_NQD: Tensor) -> Tensor:
        """ITM logits [N, 2] of query outputs that have seen a text: the mean over the queries, float32."""
        return _in_float32(self.itm_head, queries_NQD).mean(dim=1)


def _in_float32(head: nn.Linear, x: Tensor) -> Tensor:
    """A small head applied to `x` in float32, inside autocast too: its outputs are compared with each other."""
    with without_autocast(x.device):
        return F.linear(*map(widened, (x, head.weight, head.bias)))
