"""Stage 2: query outputs as soft prompts of a frozen language model (section 3.3).

Shape letters: B images (or samples of I images each), Q queries, P patches, C image-encoder channels, D Q-Former
width, H language-model width, T text tokens, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.errors import ConfigError
from blip2.models.language.model import LanguageModel
from blip2.models.qformer.model import QFormer


class LinearBridge(nn.Module):
    """No Q-Former: patches averaged to a square of `tokens`, in their own width.

    The baseline that a Q-Former has to beat; the linear layer behind it is stage 2's projection.

    Args:
        image_width: channels C of the image features.
        tokens: soft prompts Q, a square number.
    """

    def __init__(self, image_width: int, tokens: int) -> None:
        super().__init__()
        self.width = self.image_width = image_width
        self.num_queries, self.side = tokens, math.isqrt(tokens)

    def forward(self, features_BPC: Tensor) -> Tensor:
        """[B, Q, C]; prefix tokens in front of the patch grid ([CLS], registers) are left out."""
        grid = math.isqrt(features_BPC.shape[1])
        patches_BCGG = features_BPC[:, -grid * grid :].transpose(1, 2).unflatten(2, (grid, grid))
        return F.adaptive_avg_pool2d(patches_BCGG, self.side).flatten(2).transpose(1, 2)


class Stage2(nn.Module):
    """Generative learning model.

    Args:
        qformer: without its text branch (only the queries run), with one where instructions enter it,
            or a `LinearBridge`.
        language_model: frozen.
        vision: frozen image encoder; None where features come from a cache.
        norm_eps: of `ln_vision`.
        places: learned marks for the place of an image among several, for up to so many; 0 has none. They begin
            at zero.
    """

    def __init__(
        self,
        qformer: QFormer | LinearBridge,
        language_model: LanguageModel,
        vision: nn.Module | None = None,
        norm_eps: float = 1e-5,
        places: int = 0,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.ln_vision = nn.LayerNorm(qformer.image_width, eps=norm_eps)
        self.qformer = qformer
        self.language_proj = nn.Linear(qformer.width, language_model.hidden_size)
        self.image_places = nn.Parameter(torch.zeros(places, language_model.hidden_size)) if places else None
        self.language_model = language_model

    @property
    def reads_instructions(self) -> bool:
        """Whether instructions enter the Q-Former beside the queries."""
        return isinstance(self.qformer, QFormer) and self.qformer.embeddings is not None

    def soft_prompts(
        self,
        features_BPC: Tensor,
        ids_NT: Tensor | None = None,
        mask_NT: Tensor | None = None,
        *,
        marks: Sequence[Tensor] = (),
    ) -> Tensor:
        """Soft prompts [N, Q, H] from image features; of samples of I images each, [N, I x Q, H] in their order.

        Args:
            features_BPC: or [B, I, P, C]: each image goes through the Q-Former by itself, with its sample's
                instruction (as transformers' InstructBlipVideo takes the frames of a film).
            ids_NT, mask_NT: right-padded instructions for a Q-Former that reads them (InstructBLIP, arXiv 2305.06500,
                section 2.3; questions in BLIP-2, section 4.3), N a multiple of the B images: instruction n is about
                image n mod B. Without, N is B.
            marks: of samples of several images, ids of the text in front of each image's soft prompts; empty for none.
        """
        if features_BPC.ndim == 4:
            images = features_BPC.shape[1]
            read = [x_NT.repeat_interleave(images, dim=0) for x_NT in (ids_NT, mask_NT) if x_NT is not None]
            soft_MQH = self.soft_prompts(features_BPC.flatten(0, 1), *read)
            return self._in_order(soft_MQH.unflatten(0, (-1, images)), marks)
        if not isinstance(self.qformer, QFormer):
            queries_NQD = self.qformer(self.ln_vision(features_BPC.to(self.ln_vision.weight.dtype)))
        else:
            image_kv = self.qformer.project_image(features_BPC, self.ln_vision)
            if ids_NT is not None and mask_NT is not None:
                queries_NQD = self.qformer.encode_pair(ids_NT, mask_NT, image_kv)
            else:
                queries_NQD, _ = self.qformer.encode_queries(image_kv)
        out: Tensor = self.language_proj(queries_NQD)
        return out

    def _in_order(self, soft_NIQH: Tensor, marks: Sequence[Tensor]) -> Tensor:
        """Soft prompts of the I images of each sample one after the other, each with the marks of its place."""
        images = soft_NIQH.shape[1]
        if images == 1:
            return soft_NIQH[:, 0]
        if self.image_places is not None:
            if images > len(self.image_places):
                raise ConfigError(f"{images} images, and this model was trained for {len(self.image_places)} at most")
            soft_NIQH = soft_NIQH + self.image_places[:images, None].to(soft_NIQH.dtype)
        parts: list[Tensor] = []
        for place in range(images):
            if marks:
                text_TH = self.language_model.embed(marks[place].to(soft_NIQH.device))
                parts.append(text_TH.to(soft_NIQH.dtype).expand(len(soft_NIQH), -1, -1))
            parts.append(soft_NIQH[:, place])
        return torch.cat(parts, dim=1)
