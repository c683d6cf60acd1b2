"""Images inside a page, and heatmaps over them. Pillow and numpy only.

Shapes: h, w patches; S side in pixels.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

# Points of the "inferno" colours (matplotlib, CC0): dark is nothing, bright is most.
_STOPS = np.array(
    [
        [0, 0, 4],
        [40, 11, 84],
        [101, 21, 110],
        [159, 42, 99],
        [212, 72, 66],
        [245, 125, 21],
        [250, 193, 39],
        [252, 255, 164],
    ],
    dtype=np.float64,
)


def colours(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """[..., 3] of values in [0, 1]."""
    at = np.clip(values, 0, 1) * (len(_STOPS) - 1)
    return np.stack([np.interp(at, np.arange(len(_STOPS)), _STOPS[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def overlay(image: Image.Image, heat_hw: npt.NDArray[np.floating], *, share: float = 0.6) -> Image.Image:
    """An image with a map over it, scaled so that its largest value is brightest.

    Cells are drawn as they are, without smoothing: an encoder sees no finer.

    Args:
        share: of the colour where the map is largest; where it is zero the image is darkened.
    """
    largest = float(heat_hw.max(initial=0.0))
    scaled = heat_hw / largest if largest > 0 else np.zeros_like(heat_hw)
    layer = Image.fromarray(colours(scaled)).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, layer, share)


def png(image: Image.Image) -> str:
    """An image as an inline PNG of few colours: maps are flat, and there are many of them."""
    buffer = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def jpeg(image: Image.Image, side: int) -> str:
    """A thumbnail of at most `side` pixels as an inline JPEG."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def encoder_view(image: Image.Image, resize: str, side: int) -> Image.Image:
    """The part of an image that an image encoder saw, as a square: all of it squashed, or its centre (`crop`)."""
    if resize == "crop":
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        image = image.crop((left, top, left + short, top + short))
    return image.resize((side, side), Image.Resampling.BICUBIC)
