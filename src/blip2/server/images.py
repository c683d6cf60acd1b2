"""Images from strangers: JPEG, PNG and WebP only, checked before a pixel is decoded.

A decoder is given the bytes of the image alone (`blip2.data.image_container`), never its metadata or what a camera
wrote behind it. A file that is an image and something else as well (an archive, a page, a program) is refused.

Shape letters: S side in pixels.
"""

from __future__ import annotations

import base64
import io
import re
import struct
import warnings
from urllib.parse import unquote

import torch
from PIL import Image
from torch import Tensor

from blip2.data.collection import BadSampleError
from blip2.data.film import decode_sample, film_reader
from blip2.data.image_container import Container, ContainerError, take_apart
from blip2.data.image_formats import MEDIA_TYPES, format_of
from blip2.data.images import ImageSpec, decode_image, plain_view
from blip2.server.errors import RequestError, bad

_SIDE = 32768  # longest side in pixels
_THUMBNAIL = 320
_DATA_URL = re.compile(r"\s*data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")
_BASE64 = re.compile(r"[A-Za-z0-9+/]*")
_DOCUMENT = re.compile(rb"<svg|<html|<script|<!doctype|<iframe|<\?php|<!entity|%pdf-|#!/", re.IGNORECASE)
_FOREIGN_START = re.compile(rb"<|%pdf-|#!|PK\x03\x04|MZ|\x7fELF|Rar!|7z\xbc\xaf", re.IGNORECASE)
_ARCHIVE_END = b"PK\x05\x06"


def checked_image(data: bytes, max_pixels: int) -> bytes:
    """The bytes that the pixels depend on, once they are known to be one complete, harmless image.

    Raises:
        RequestError: 400 not an image, truncated, damaged or more than an image; 413 too many pixels;
            415 another type.
    """
    if not data:
        raise _invalid("image is empty")
    kind = format_of(data)
    if kind is None:
        raise _unsupported("image")
    try:
        file = take_apart(data, kind.name)
    except ContainerError as error:
        raise _invalid(str(error)) from None
    _refuse_polyglot(file)
    _check_header(file.pixels, kind.name, max_pixels)
    return file.pixels


def view_of(data: bytes, spec: ImageSpec) -> Tensor:
    """A checked image as the image encoder takes it, [3, S, S].

    Raises:
        RequestError: 400, it cannot be decoded after all.
    """
    try:
        return plain_view(decode_image(data), spec)
    except BadSampleError as error:
        raise _invalid(error.reason) from None


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of an indexed image, with nothing of the file but its pixels.

    Raises:
        BadSampleError: it cannot be decoded.
    """
    small = decode_image(data)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def film_views(data: bytes, spec: ImageSpec, max_pixels: int) -> Tensor:
    """The frames of a film as the image encoder takes them, [I, 3, S, S].

    Raises:
        RequestError: 400 no film, or one that cannot be decoded; 413 too many pixels.
    """
    if film_reader(data) is None and not data.startswith(b"GIF8"):
        raise bad("video is no MP4, WebM, AVI or GIF", "video", "invalid_video")
    try:
        frames = decode_sample(data, spec.frames)
    except BadSampleError as error:
        raise bad(f"video: {error.reason}", "video", "invalid_video") from None
    if max(frame.width * frame.height for frame in frames) > max_pixels:
        message = f"video has more than {max_pixels} pixels a frame"
        raise RequestError(413, message, code="video_too_large", param="video")
    return torch.stack([plain_view(frame, spec) for frame in frames])


def from_data_url(url: str, param: str = "image", *, film: bool = False) -> bytes:
    """The bytes of a `data:image/...;base64,` URL, as forgiving as browsers are and a little more.

    Args:
        film: a film's, whose bytes say its type.

    Blanks and line breaks anywhere, missing padding, the URL-safe alphabet, percent-encoding and further parameters
    (`name=dog.jpg`) do not matter.

    Raises:
        RequestError: 400 no such URL; 415 of another type.
    """
    head = _DATA_URL.match(url[:1000])
    if head is None or "base64" not in head[2].lower().replace(" ", "").split(";"):
        raise _invalid("image must be a data URL: data:image/jpeg;base64,...", param)
    if not film and head[1].strip().lower() not in (*MEDIA_TYPES, "image/jpg", "application/octet-stream", ""):
        raise _unsupported(param)
    text = url[head.end() :]
    text = "".join((unquote(text) if "%" in text else text).split()).translate(_URL_SAFE).rstrip("=")
    if len(text) % 4 == 1 or not _BASE64.fullmatch(text):
        raise _invalid("image's data URL is not valid base64", param)
    return base64.b64decode(text + "=" * (-len(text) % 4))


def _invalid(message: str, param: str = "image") -> RequestError:
    return bad(message, param, "invalid_image")


def _unsupported(param: str) -> RequestError:
    return RequestError(
        415, "image is not a JPEG, PNG or WebP: convert it to one", code="unsupported_image", param=param
    )


def _too_large(message: str) -> RequestError:
    return RequestError(413, message, code="image_too_large", param="image")


def _check_header(data: bytes, kind: str, max_pixels: int) -> None:
    """Size limits from the header, then Pillow's own check of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                width, height = image.size
                if width * height > max_pixels or max(width, height) > _SIDE:
                    raise _too_large(
                        f"image has {width}x{height} pixels: {max_pixels} in all and {_SIDE} a side are allowed"
                    )
                image.verify()
    except (RequestError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise _too_large("image has too many pixels") from None
    # A malformed file can raise anything inside Pillow's readers: struct.error, SyntaxError, zlib.error, ...
    except Exception:
        raise _invalid("image cannot be decoded") from None


def _refuse_polyglot(file: Container) -> None:
    """Refuse an image that is a document, an archive or a program as well, as nothing that takes images makes."""
    if any(_DOCUMENT.search(metadata) for metadata in file.metadata):
        raise _invalid("image carries another document inside")
    if _FOREIGN_START.match(file.rest.lstrip(b"\0 \t\r\n")):
        raise _invalid("image has a document, an archive or a program behind its end")
    tail = file.rest[-65557:]
    end = tail.rfind(_ARCHIVE_END)
    if end >= 0 and len(tail) - end >= 22 and end + 22 + struct.unpack_from("<H", tail, end + 20)[0] == len(tail):
        raise _invalid("image is an archive as well")
