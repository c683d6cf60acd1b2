"""The frozen image encoder and the feature cache: sides of `claims/encoder.py`."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness.worker import Outputs, Side
from benchmarks.sides.models import weights_dtype
from blip2.data.collection import Collection, Sample
from blip2.data.feature_cache import FeatureCache
from blip2.data.images import ImageSpec
from blip2.models.freezing import freeze
from blip2.models.vision.encoder import vision_encoder_from_config
from blip2.ops.devices import autocast

# hidden width, blocks, heads, images of a batch; paper: ViT-L/14 up to its second-last block
SHAPES = {"paper": (1024, 23, 16, 8), "tiny": (64, 3, 4, 4)}


def _config(name: str) -> Any:
    from transformers import CLIPVisionConfig

    width, depth, heads, _ = SHAPES[name]
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return CLIPVisionConfig(**sizes, intermediate_size=4 * width, image_size=224, patch_size=14)


def _pixels(settings: dict[str, Any]) -> Tensor:
    batch = SHAPES[settings["size"]["name"]][3]
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return pixels.to(device=settings["device"], dtype=weights_dtype(settings))


def _side(settings: dict[str, Any], encode: Any) -> Side:
    pixels = _pixels(settings)

    def run() -> Tensor:
        with autocast(torch.device(settings["device"]), settings["precision"]):
            features: Tensor = encode(pixels)
        return features

    return Side(run, lambda: {"features": run().float().cpu().numpy()}, scale=len(pixels))


def ours(settings: dict[str, Any]) -> Side:
    """Our encoder, as a run uses it: its blocks compiled or not."""
    torch.manual_seed(3)
    encoder = vision_encoder_from_config(_config(settings["size"]["name"]))
    encoder = encoder.to(device=settings["device"], dtype=weights_dtype(settings))
    freeze(encoder)
    if settings.get("compiled"):
        encoder.compile_blocks()
    return _side(settings, encoder)


def transformers(settings: dict[str, Any]) -> Side:
    """transformers' `CLIPVisionModel` under `inference_mode`: eager, SDPA, or SDPA compiled."""
    from transformers import CLIPVisionModel

    torch.manual_seed(3)
    kind = settings["attention"]
    attention = "eager" if kind == "eager" else "sdpa"
    model: Any = CLIPVisionModel._from_config(_config(settings["size"]["name"]), attn_implementation=attention)
    model = model.eval().to(device=settings["device"], dtype=weights_dtype(settings))
    call = torch.compile(model) if kind == "compiled" else model

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Tensor:
        features: Tensor = call(pixel_values=pixels).last_hidden_state
        return features

    return _side(settings, encode)


def cache(settings: dict[str, Any]) -> Side:
    """A batch read again from a feature cache of 64 images."""
    pixels = _pixels(settings)
    features = ours(settings).check()["features"]
    folder, count = Path(settings["folder"]), 64
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    (folder / "image.jpg").write_bytes(buffer.getvalue())
    samples = [Sample(str(n), str(n), ("",), str(folder / "image.jpg")) for n in range(count)]
    rows = itertools.cycle(torch.from_numpy(features))

    def encode(views: Tensor) -> Tensor:
        return torch.stack([next(rows) for _ in range(len(views))])

    store = FeatureCache.open_or_build(
        folder / "cache",
        Collection("bench", samples),
        spec=ImageSpec(16, (0.0,) * 3, (1.0,) * 3),
        encoder_id="bench",
        encode=encode,
        progress=False,
    )
    rng = np.random.default_rng(0)
    reads = [rng.permutation(count)[: len(pixels)] for _ in range(50)]

    def run() -> None:
        for read in reads:
            store.get(read.tolist(), [0] * len(read)).to(settings["device"])

    def check() -> Outputs:
        return {"features": store.get(range(len(pixels)), [0] * len(pixels)).float().numpy()}

    return Side(run, check, scale=len(pixels) * len(reads))
