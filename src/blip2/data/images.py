"""Images from paths and bytes, and the square, normalised views that encoders take. No torchvision.

Shape letters: S side in pixels.
"""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from blip2.data.collection import BadSampleError
from blip2.data.image_container import ContainerError, take_apart
from blip2.data.image_formats import FORMATS, format_of, other_kind
from blip2.errors import DataError

# Above this an image is refused from its header, before a pixel is decoded.
MAX_PIXELS = 100_000_000
# Longest side in shorter sides that a centre crop scales.
_LONGEST = 16
_BROKEN_EXIF = (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error)
# `warnings.catch_warnings` changes the whole process; views are made in several threads.
_WARNINGS = threading.Lock()
T = TypeVar("T")
# An image as users hand it over.
ImageLike = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class ImageSpec:
    """What an image encoder takes.

    Args:
        size: side S in pixels.
        mean, std: of the normalisation, per channel, for values in [0, 1].
        resize: `squash` scales both sides, `crop` scales the shorter and takes the centre.
        frames: images that a film is drawn as; views of images do not depend on it.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "squash"
    frames: int = field(default=4, repr=False, compare=False)


def open_image(image: ImageLike) -> Image.Image:
    """An RGB image from a path, bytes, or a Pillow image.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, bytes):
        name, data = "image", image
    else:
        name = str(image)
        try:
            data = Path(image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
            raise DataError(f"{name}: {getattr(error, 'strerror', error)}") from error
    try:
        return decode_image(data)
    except BadSampleError as error:
        raise DataError(f"{name}: {error.reason}") from error


def listed(images: Any) -> list[Any]:
    """One image or several, as a list."""
    if isinstance(images, str | Path | bytes | Image.Image):
        return [images]
    return list(images)


def distinct(images: list[T]) -> tuple[list[T], list[int]]:
    """Images without repeats (by path, content or identity), and for each image given its position among them.

    A list of images, which belong together, counts as one.
    """
    keys = [_key(image) for image in images]
    by_key = dict(zip(reversed(keys), reversed(images), strict=True))  # of equal ones the first
    positions = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    return [by_key[key] for key in positions], [positions[key] for key in keys]


def _key(image: object) -> object:
    if isinstance(image, list | tuple):
        return tuple(map(_key, image))
    return id(image) if isinstance(image, Image.Image) else str(image) if isinstance(image, Path) else image


def decode_image(data: bytes, opened: Callable[[Image.Image], object] | None = None) -> Image.Image:
    """An RGB image, upright, of the first frame.

    CMYK, 16-bit, palette and grey images are converted; transparency is laid on white.

    Args:
        opened: called with the image when its header is read and no pixel is decoded yet.

    Raises:
        BadSampleError: zero bytes, no image, truncated, or a decompression bomb.
    """
    if not data:
        raise BadSampleError("zero-byte image")
    try:
        image = _opened(data)
        _refuse_bomb(image)
        if opened is not None:
            opened(image)
        image.load()
        return to_rgb(image)
    except (BadSampleError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+ pixels", str(error))
        raise BadSampleError(f"image is a decompression bomb ({pixels[0] if pixels else 'too large'})") from None
    except UnidentifiedImageError:
        other = other_kind(data)
        raise BadSampleError(f"not an image that can be decoded ({other})" if other else "not an image") from None
    # A malformed file can raise anything inside Pillow's readers: struct.error, KeyError, zlib.error, ...
    except Exception as error:
        cut = isinstance(error, EOFError) or re.search("truncated|broken data stream", str(error), re.IGNORECASE)
        raise BadSampleError("image is truncated" if cut else "image cannot be decoded") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode upright and in RGB; itself where it is both."""
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def plain_view(image: Image.Image, spec: ImageSpec) -> Tensor:
    """The whole image (or its centre) as [3, S, S] float32, normalised; bicubic."""
    size = spec.size
    if spec.resize == "crop":
        width, height = image.size
        short = min(width, height)
        if max(width, height) > _LONGEST * short:
            # A strip one pixel wide would be scaled to gigabytes, of which the centre is kept.
            image = _centre(image, min(width, _LONGEST * short), min(height, _LONGEST * short))
            width, height = image.size
        # Rounded down, as transformers and torchvision do.
        wide, high = (size * width // short, size) if width > height else (size, size * height // short)
        image = _centre(image.resize((wide, high), Image.Resampling.BICUBIC), size, size)
    return _normalised(image.resize((size, size), Image.Resampling.BICUBIC), spec)


def decode_augmented(data: bytes, spec: ImageSpec, rng: np.random.Generator, crop_min: float) -> Tensor:
    """A random resized crop of an image, flipped half of the time, as [3, S, S] float32, normalised.

    Crops keep a share of the area in [crop_min, 1] and an aspect ratio in [3/4, 4/3]; cropping
    before resizing equals torchvision's RandomResizedCrop bit for bit. Where the crop is twice as
    large as the view or more, a JPEG is decoded at a half, a quarter or an eighth of its size, never
    below the view's: libjpeg then skips what the resizing would average away. Values differ by less
    than one of 255 on average; smaller crops and other formats give the same values bit for bit.

    Raises:
        BadSampleError: as `decode_image`.
    """
    box: tuple[int, int, int, int] | None = None
    scale = 1

    def opened(image: Image.Image) -> None:
        nonlocal box, scale
        # the box is drawn in the upright image
        if image.format != "JPEG" or _orientation(image) != 1:
            return
        box = _random_box(*image.size, rng, crop_min)
        wide, high = image.size
        fits = [s for s in (8, 4, 2) if min(box[2:]) >= s * spec.size]
        if fits:
            image.draft(None, (wide // fits[0], high // fits[0]))
            scale = round(wide / image.size[0])

    image = decode_image(data, opened)
    return _cropped(image, box or _random_box(*image.size, rng, crop_min), scale, spec, rng)


def augmented_view(image: Image.Image, spec: ImageSpec, rng: np.random.Generator, crop_min: float) -> Tensor:
    """As `decode_augmented`, of an image that is decoded already."""
    return _cropped(image, _random_box(*image.size, rng, crop_min), 1, spec, rng)


def _cropped(
    image: Image.Image, box: tuple[int, int, int, int], scale: int, spec: ImageSpec, rng: np.random.Generator
) -> Tensor:
    """The box (left, top, width, height) of an image decoded at 1 / scale, resized, flipped half of the time."""
    left, top, width, height = box
    size = (spec.size, spec.size)
    if scale == 1:
        view = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
    else:
        right, bottom = min((left + width) / scale, image.width), min((top + height) / scale, image.height)
        view = image.resize(size, Image.Resampling.BICUBIC, box=(left / scale, top / scale, right, bottom))
    if rng.random() < 0.5:
        view = ImageOps.mirror(view)
    return _normalised(view, spec)


def _random_box(width: int, height: int, rng: np.random.Generator, crop_min: float) -> tuple[int, int, int, int]:
    area = width * height
    for _ in range(10):
        crop_area = area * rng.uniform(crop_min, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(crop_area * ratio)), round(math.sqrt(crop_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    # No box fits: the largest centred one within the aspect ratios.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _normalised(image: Image.Image, spec: ImageSpec) -> Tensor:
    # channels first while a value is still one byte
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().mul_(1 / 255)
    return values.sub_(torch.tensor(spec.mean).view(3, 1, 1)).div_(torch.tensor(spec.std).view(3, 1, 1))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey image of 16-bit, 32-bit or float values, scaled by what its mode or its values say is white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    largest = values.max(initial=0)
    if image.mode.startswith("I;16") or largest > 255:
        white = 65535.0
    else:
        white = 1.0 if image.mode == "F" and largest <= 1 else 255.0
    return Image.fromarray(np.clip(values * (255.0 / white), 0, 255).astype(np.uint8))


def _opened(data: bytes) -> Image.Image:
    """The image, of which a decoder sees only what its pixels depend on, where it can be told (`image_container`)."""
    kind = format_of(data)
    if kind is not None:
        with suppress(ContainerError):  # Pillow reads more than the standard allows, and says what is wrong
            data = take_apart(data, kind.name).pixels
    Image.init()  # registers every format: `open` refuses a name that it does not know yet
    formats = [kind.name for kind in FORMATS if kind.name in Image.OPEN]
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels, which `_refuse_bomb` counts, and of damaged tags
        return Image.open(io.BytesIO(data), formats=formats)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it is where there is none or the EXIF is broken."""
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN_EXIF:
        return image


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8; 1 where there is none or it cannot be read."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of Pillow's, about damaged tags
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except _BROKEN_EXIF:
            return 1
    return orientation if orientation in range(1, 9) else 1


def _refuse_bomb(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"image is a decompression bomb ({width}x{height} pixels)")
