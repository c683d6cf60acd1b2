"""What examples and notebooks ask of a model; `Blip2` has it, and imports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from blip2.data.image_inputs import ImageLike
from blip2.explain.attention import Attention
from blip2.explain.types import Explainable


class Model(Explainable, Protocol):
    """A loaded model that captions and answers; see `blip2.inference.Blip2`."""

    def soft_prompts(self, features_BPC: Tensor, questions: Sequence[str] | None = None) -> Tensor: ...

    def caption(
        self, images: ImageLike | Sequence[ImageLike], *, prompt: str | None = None, **options: Any
    ) -> list[Any]: ...

    def ask_many(
        self, images: ImageLike | Sequence[ImageLike], questions: Sequence[str], **options: Any
    ) -> list[list[str]]: ...

    def attend(self, image: ImageLike, text: str | None = None) -> Attention: ...
