"""Pictures from bytes, and the square, normalised views that encoders take. No torchvision.

Shape letters: S side in pixels.
"""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from blip2.data.samples import BadSampleError

# Above this an image is refused from its header, before a pixel is decoded.
MAX_PIXELS = 100_000_000
# Rasters only: Pillow hands EPS to Ghostscript, which no downloaded file should reach.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "AVIF")
# Longest side in shorter sides that a centre crop scales.
_LONGEST = 16
# `warnings.catch_warnings` changes the whole process; views are made in several threads.
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class ImageSpec:
    """What an image encoder takes.

    Args:
        size: side S in pixels.
        mean, std: of the normalisation, per channel, for values in [0, 1].
        resize: `squash` scales both sides, `crop` scales the shorter and takes the centre.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "squash"


def decode_image(data: bytes) -> Image.Image:
    """An RGB picture, upright, of the first frame.

    CMYK, 16-bit, palette and grey pictures are converted; transparency is laid on white.

    Raises:
        BadSampleError: zero bytes, no image, truncated, or a decompression bomb.
    """
    if not data:
        raise BadSampleError("zero-byte image")
    try:
        picture = _opened(data)
        _refuse_bomb(picture)
        picture.load()
        return to_rgb(picture)
    except (BadSampleError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+ pixels", str(error))
        raise BadSampleError(f"image is a decompression bomb ({pixels[0] if pixels else 'too large'})") from None
    except UnidentifiedImageError:
        raise BadSampleError("not an image") from None
    # A malformed file can raise anything inside Pillow's readers: struct.error, KeyError, zlib.error, ...
    except Exception as error:
        cut = isinstance(error, EOFError) or re.search("truncated|broken data stream", str(error), re.IGNORECASE)
        raise BadSampleError("image is truncated" if cut else "image cannot be decoded") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """An upright RGB copy of a picture of any mode."""
    picture = _upright(picture)
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bit(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def plain_view(picture: Image.Image, spec: ImageSpec) -> Tensor:
    """The whole picture (or its centre) as [3, S, S] float32, normalised; bicubic."""
    size = spec.size
    if spec.resize == "crop":
        width, height = picture.size
        short = min(width, height)
        if max(width, height) > _LONGEST * short:
            # A strip one pixel wide would be scaled to gigabytes, of which the centre is kept.
            picture = _centre(picture, min(width, _LONGEST * short), min(height, _LONGEST * short))
            width, height = picture.size
        # Rounded down, as transformers and torchvision do.
        wide, high = (size * width // short, size) if width > height else (size, size * height // short)
        picture = _centre(picture.resize((wide, high), Image.Resampling.BICUBIC), size, size)
    return _normalised(picture.resize((size, size), Image.Resampling.BICUBIC), spec)


def augmented_view(picture: Image.Image, spec: ImageSpec, rng: np.random.Generator, crop_min: float) -> Tensor:
    """A random resized crop, flipped half of the time, as [3, S, S] float32, normalised.

    Crops keep a share of the area in [crop_min, 1] and an aspect ratio in [3/4, 4/3]; cropping
    before resizing equals torchvision's RandomResizedCrop bit for bit.
    """
    left, top, width, height = _random_box(*picture.size, rng, crop_min)
    view = picture.crop((left, top, left + width, top + height))
    view = view.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        view = ImageOps.mirror(view)
    return _normalised(view, spec)


def _random_box(width: int, height: int, rng: np.random.Generator, crop_min: float) -> tuple[int, int, int, int]:
    area = width * height
    for _ in range(10):
        wanted = area * rng.uniform(crop_min, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    # No box fits: the largest centred one within the aspect ratios.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _centre(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _normalised(picture: Image.Image, spec: ImageSpec) -> Tensor:
    values = np.asarray(picture, dtype=np.float32) * np.float32(1 / 255)
    values -= np.asarray(spec.mean, np.float32)
    values /= np.asarray(spec.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Grey picture of 16-bit, 32-bit or float values, scaled by what its mode or its values say is white."""
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    largest = values.max(initial=0)
    if picture.mode.startswith("I;16") or largest > 255:
        white = 65535.0
    else:
        white = 1.0 if picture.mode == "F" and largest <= 1 else 255.0
    return Image.fromarray(np.clip(values * (255.0 / white), 0, 255).astype(np.uint8))


def _opened(data: bytes) -> Image.Image:
    Image.init()  # registers every format: `open` refuses a name that it does not know yet
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=formats)


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it is where the EXIF is broken."""
    try:
        return ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return picture


def _refuse_bomb(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"image is a decompression bomb ({width}x{height} pixels)")
