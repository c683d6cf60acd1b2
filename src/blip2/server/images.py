"""Pictures from strangers: JPEG, PNG and WebP only, looked at before a pixel is decoded.

Shape letters: S side in pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings

from PIL import Image
from torch import Tensor

from blip2.data.collection import BadSampleError
from blip2.data.image_formats import MEDIA_TYPES, format_of
from blip2.data.images import ImageSpec, decode_image, plain_view
from blip2.server.errors import RequestError, bad
from blip2.server.image_formats import ContainerError, check_container

_DATA_URL = re.compile(r"data:([a-z0-9.+/-]*)((?:;[a-z0-9=.+-]+)*),", re.IGNORECASE)
_SIDE = 32768  # longest side in pixels
_THUMB = 320


def checked_image(data: bytes, max_pixels: int) -> bytes:
    """The bytes as they came, once they are known to be one whole, harmless picture.

    Raises:
        RequestError: 400 not an image, truncated, damaged or more than an image; 413 too many pixels;
            415 another type.
    """
    if not data:
        raise bad("image is empty", "image", "invalid_image")
    kind = format_of(data)
    if kind is None:
        raise RequestError(
            415, "image is not a JPEG, PNG or WebP: convert it to one", code="unsupported_image", param="image"
        )
    try:
        check_container(data, kind.name)
        _check_header(data, kind.name, max_pixels)
    except ContainerError as error:
        raise bad(str(error), "image", "invalid_image") from None
    return data


def view_of(data: bytes, spec: ImageSpec) -> Tensor:
    """A checked picture as the image encoder takes it, [3, S, S].

    Raises:
        RequestError: 400, it cannot be decoded after all.
    """
    try:
        return plain_view(decode_image(data), spec)
    except BadSampleError as error:
        raise bad(error.reason, "image", "invalid_image") from None


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of an indexed picture, with nothing of the file but its pixels.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    small = decode_image(data)
    small.thumbnail((_THUMB, _THUMB))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def from_data_url(url: str, param: str = "image") -> bytes:
    """The bytes of a `data:image/...;base64,` URL.

    Raises:
        RequestError: 400 no such URL; 415 of another type.
    """
    head = _DATA_URL.match(url[:200])
    if head is None or not head[2].lower().endswith(";base64"):
        raise bad("image must be a data URL: data:image/jpeg;base64,...", param, "invalid_image")
    if head[1].lower() not in (*MEDIA_TYPES, "image/jpg", "application/octet-stream", ""):
        raise RequestError(
            415, "image is not a JPEG, PNG or WebP: convert it to one", code="unsupported_image", param=param
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad("image's data URL is not valid base64", param, "invalid_image") from None


def _check_header(data: bytes, kind: str, max_pixels: int) -> None:
    """Size limits from the header, then Pillow's own check of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=[kind]) as picture:
                width, height = picture.size
                if width * height > max_pixels or max(width, height) > _SIDE:
                    raise RequestError(
                        413,
                        f"image has {width}x{height} pixels: {max_pixels} in all and {_SIDE} a side are allowed",
                        code="image_too_large",
                        param="image",
                    )
                picture.verify()
    except (RequestError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise RequestError(413, "image has too many pixels", code="image_too_large", param="image") from None
    # A malformed file can raise anything inside Pillow's readers: struct.error, SyntaxError, zlib.error, ...
    except Exception:
        raise ContainerError("image cannot be decoded") from None
