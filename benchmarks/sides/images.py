"""JPEG bytes to a normalised training view: ours, and torchvision's published recipe written with PIL."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness.worker import Outputs, Side
from blip2.data.images import ImageSpec, _random_box, decode_augmented
from blip2.models.vision.encoder import CLIP_MEAN, CLIP_STD

COUNT, CROP_MIN = 16, 0.5


def write(folder: Path, width: int, height: int, count: int = COUNT) -> None:
    """JPEGs like photographs: soft shapes, edges, grain; quality 90 (the web's usual)."""
    for number in range(count):
        rng = np.random.default_rng(number)
        shapes = Image.fromarray(rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
        values = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        values = values + rng.normal(0, 5, values.shape)
        values[:: int(rng.integers(30, 60))] = 20
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=90)


def _recipe(data: bytes, spec: ImageSpec, rng: np.random.Generator) -> Tensor:
    """`pil_loader`, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, width, height = _random_box(*image.size, rng, CROP_MIN)
    view = image.crop((left, top, left + width, top + height)).resize((spec.size,) * 2, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(view, np.uint8, copy=True)).view(spec.size, spec.size, 3)
    tensor = values.permute(2, 0, 1).contiguous().to(dtype=torch.float32).div(255).clone()
    mean, std = (torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (spec.mean, spec.std))
    return tensor.sub_(mean).div_(std)


def _ours(data: bytes, spec: ImageSpec, rng: np.random.Generator) -> Tensor:
    return decode_augmented(data, spec, rng, CROP_MIN)


def _side(settings: dict[str, Any], view: Any) -> Side:
    files = [(Path(settings["folder"]) / f"{number}.jpg").read_bytes() for number in range(COUNT)]
    spec = ImageSpec(224, CLIP_MEAN, CLIP_STD)

    def run() -> list[Tensor]:
        return [view(data, spec, np.random.default_rng(number)) for number, data in enumerate(files)]

    def check() -> Outputs:
        # means of 8 x 8 squares: a reduced decoding may move single pixels, not what is seen
        squares = torch.nn.functional.avg_pool2d(torch.stack(run()), 8)
        return {"views": squares.numpy()}

    return Side(run, check, scale=COUNT)


def ours(settings: dict[str, Any]) -> Side:
    """The path of a training run."""
    return _side(settings, _ours)


def torchvision_recipe(settings: dict[str, Any]) -> Side:
    """As in torchvision's reference training."""
    return _side(settings, _recipe)
