"""What one step learns from: images and their texts, on one device, split into micro-batches.

Shape letters: B samples, M images of all samples, S side in pixels, P patches, C image-encoder channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from blip2.data.collection import BadSample
from blip2.errors import DataError


@dataclass
class Batch:
    """Images and their texts of one step of one process.

    Args:
        image_ids: int64 [B]; equal ids are the same image.
        captions: N texts, N a multiple of B: text n is about image n mod B.
        pixels: float32 [M, 3, S, S], or None where features are given; M is B unless `images` says otherwise.
        features: [M, P, C] of the frozen encoder, or None.
        skipped: bad samples met while this batch was made, each key once per process.
        questions: one per text where questions are learned; `captions` are then their answers. Empty
            where the text is a caption after all.
        images: how many images each sample has, which follow each other in `pixels`; None: one each.
    """

    keys: list[str]
    image_ids: Tensor
    captions: list[str]
    pixels: Tensor | None = None
    features: Tensor | None = None
    skipped: list[BadSample] = field(default_factory=list)
    questions: list[str] | None = None
    images: list[int] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        pixels = self.pixels.to(device, non_blocking=True) if self.pixels is not None else None
        features = self.features.to(device, non_blocking=True) if self.features is not None else None
        return replace(self, image_ids=self.image_ids.to(device), pixels=pixels, features=features)

    def groups(self, features_MPC: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Samples with equally many images: positions, and features [b, P, C] or, of I > 1 images, [b, I, P, C]."""
        if self.images is None:
            yield list(range(len(self))), features_MPC
            return
        each = features_MPC.split(self.images)
        for count in sorted(set(self.images)):
            rows = [n for n, images in enumerate(self.images) if images == count]
            group = torch.stack([each[n] for n in rows])
            yield rows, group[:, 0] if count == 1 else group

    def split(self, parts: int) -> list[Batch]:
        """Micro-batches of equal size, in order; the first carries what was skipped."""
        if len(self) % parts:
            raise DataError(f"a batch of {len(self)} cannot be split into {parts} equal micro-batches")
        size = len(self) // parts
        return [self._slice(slice(n * size, (n + 1) * size), first=n == 0) for n in range(parts)]

    def _slice(self, part: slice, *, first: bool) -> Batch:
        def texts(of: list[str]) -> list[str]:
            return [text for start in range(0, len(of), len(self)) for text in of[start : start + len(self)][part]]

        images, own = None, part
        if self.images is not None:
            images, before = self.images[part], sum(self.images[: part.start])
            own = slice(before, before + sum(images))
        return Batch(
            self.keys[part],
            self.image_ids[part],
            texts(self.captions),
            self.pixels[own] if self.pixels is not None else None,
            self.features[own] if self.features is not None else None,
            self.skipped if first else [],
            texts(self.questions) if self.questions is not None else None,
            images,
        )
