"""Stage 2: query outputs as soft prompts of a frozen language model (section 3.3).

Shape letters: B images, Q queries, P patches, C image-encoder channels, D Q-Former width,
H language-model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from blip2.models.language_model import LanguageModel
from blip2.models.qformer import QFormer


class Stage2(nn.Module):
    """Generative learning model.

    Args:
        qformer: without its text branch (only the queries run).
        language_model: frozen.
        vision: frozen image encoder; None where features come from a cache.
        norm_eps: of `ln_vision`.
    """

    def __init__(
        self, qformer: QFormer, language_model: LanguageModel, vision: nn.Module | None = None, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.vision = vision
        self.ln_vision = nn.LayerNorm(qformer.image_width, eps=norm_eps)
        self.qformer = qformer
        self.language_proj = nn.Linear(qformer.width, language_model.hidden_size)
        self.language_model = language_model

    def features(self, pixels_B3SS: Tensor) -> Tensor:
        """Image features [B, P, C] of the frozen encoder."""
        if self.vision is None:
            raise ValueError("this model was built without its image encoder: give features instead of pixels")
        out: Tensor = self.vision(pixels_B3SS)
        return out

    def soft_prompts(self, features_BPC: Tensor) -> Tensor:
        """Soft prompts [B, Q, H] from image features."""
        image_kv = self.qformer.project_image(self.ln_vision(features_BPC.to(self.ln_vision.weight.dtype)))
        queries_BQD, _ = self.qformer.encode_queries(image_kv)
        out: Tensor = self.language_proj(queries_BQD)
        return out
