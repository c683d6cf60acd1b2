"""Pictures as users hand them over: paths, bytes or Pillow images, one or several."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from blip2.data.collection import BadSampleError
from blip2.data.images import decode_image
from blip2.errors import DataError

ImageLike = str | Path | bytes | Image.Image


def open_image(image: ImageLike) -> Image.Image:
    """An RGB picture from a path, bytes, or a Pillow image.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return decode_image(buffer.getvalue())
    if isinstance(image, bytes):
        name, data = "image", image
    else:
        name = str(image)
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}") from error
    try:
        return decode_image(data)
    except BadSampleError as error:
        raise DataError(f"{name}: {error.reason}") from error


def listed(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One image or several, as a list."""
    if isinstance(images, str | Path | bytes | Image.Image):
        return [images]
    return list(images)


def distinct(pictures: list[ImageLike]) -> tuple[list[ImageLike], list[int]]:
    """Pictures without repeats (by path, content or identity), and the place of each one given among them."""
    found: dict[str | bytes | int, ImageLike] = {}
    keys: list[str | bytes | int] = []
    for picture in pictures:
        own = id(picture) if isinstance(picture, Image.Image) else picture
        keys.append(str(own) if isinstance(own, Path) else own)
        found.setdefault(keys[-1], picture)
    places = {key: place for place, key in enumerate(found)}
    return list(found.values()), [places[key] for key in keys]
