"""What looking into a model asks of it: `blip2.inference.Blip2` has it, and this room stands above that one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from blip2.configs import DecodingConfig, RunConfig
from blip2.data.images import ImageLike, ImageSpec
from blip2.data.tokenizers import LanguageTokenizer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder


class Explainable(Protocol):
    """A loaded model with its image encoder, its stages and their tokenizers; see `blip2.inference.Blip2`."""

    config: RunConfig
    stage2: Stage2 | None
    vision: VisionEncoder
    device: torch.device
    batch: int

    @property
    def stage1(self) -> Stage1: ...

    @property
    def has_itm(self) -> bool: ...

    @property
    def language_tokenizer(self) -> LanguageTokenizer: ...

    @property
    def image_spec(self) -> ImageSpec: ...

    def features(self, images: ImageLike | Sequence[ImageLike]) -> Tensor: ...

    def text_ids(self, texts: list[str]) -> tuple[Tensor, Tensor]: ...

    def embed_texts(self, texts: str | Sequence[str]) -> Tensor: ...

    def caption_features(self, features_BPC: Tensor, prompt: str | None, config: DecodingConfig) -> list[list[str]]: ...
