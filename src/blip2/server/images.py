"""Images from strangers: JPEG, PNG and WebP only, checked before a pixel is decoded.

Pillow accepts any bytes behind an image, or inside its comments; a file that is an image and something else as
well (an archive, a page, a script) is recognised by reading its container.

Shape letters: S side in pixels.
"""

from __future__ import annotations

import base64
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image
from torch import Tensor

from blip2.data.collection import BadSampleError
from blip2.data.image_formats import MEDIA_TYPES, format_of
from blip2.data.images import ImageSpec, decode_image, plain_view
from blip2.server.errors import RequestError, bad

_SIDE = 32768  # longest side in pixels
_THUMBNAIL = 320
_DATA_URL = re.compile(r"data:([a-z0-9.+/-]*)((?:;[a-z0-9=.+-]+)*),", re.IGNORECASE)
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_FOREIGN = re.compile(rb"<svg|<html|<script|<!doctype|<iframe|<\?php|<!entity|%pdf-|#!/", re.IGNORECASE)
_ARCHIVE_END = b"PK\x05\x06"


def checked_image(data: bytes, max_pixels: int) -> bytes:
    """The bytes as they came, once they are known to be one complete, harmless image.

    Raises:
        RequestError: 400 not an image, truncated, damaged or more than an image; 413 too many pixels;
            415 another type.
    """
    if not data:
        raise _invalid("image is empty")
    kind = format_of(data)
    if kind is None:
        raise _unsupported("image")
    _check_container(data, kind.name)
    _check_header(data, kind.name, max_pixels)
    return data


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


def from_data_url(url: str, param: str = "image") -> bytes:
    """The bytes of a `data:image/...;base64,` URL.

    Raises:
        RequestError: 400 no such URL; 415 of another type.
    """
    head = _DATA_URL.match(url[:200])
    if head is None or not head[2].lower().endswith(";base64"):
        raise _invalid("image must be a data URL: data:image/jpeg;base64,...", param)
    if head[1].lower() not in (*MEDIA_TYPES, "image/jpg", "application/octet-stream", ""):
        raise _unsupported(param)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except ValueError:
        raise _invalid("image's data URL is not valid base64", param) from None


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


def _check_container(data: bytes, kind: str) -> None:
    """Refuse what is cut short, goes on behind its end, or carries another format along."""
    read_extras = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp}[kind]
    try:
        if any(_FOREIGN.search(extra) for extra in read_extras(data)):
            raise _invalid("image carries another document inside")
    except (IndexError, struct.error):
        raise _invalid("image is truncated") from None
    end = data.rfind(_ARCHIVE_END, max(0, len(data) - 65557))
    if end >= 0 and len(data) - end >= 22 and end + 22 + struct.unpack_from("<H", data, end + 20)[0] == len(data):
        raise _invalid("image is an archive as well")


def _jpeg(data: bytes) -> Iterator[bytes]:
    """The comment and application segments; further images behind the first are those of an MPO."""
    at = 0
    while True:
        parts, at = _jpeg_segments(data, at)
        yield from parts
        rest = data[at : at + 65536].lstrip(b"\0")
        padding = min(len(data) - at, 65536) - len(rest)
        if not rest and at + padding >= len(data):
            return
        if not rest.startswith(b"\xff\xd8\xff"):
            raise _invalid("image has other bytes behind its end")
        at += padding


def _jpeg_segments(data: bytes, at: int) -> tuple[list[bytes], int]:
    parts: list[bytes] = []
    at += 2
    while True:
        match = _MARKER.match(data, at)
        if match is None:
            raise _invalid("image is truncated" if at >= len(data) - 1 else "image cannot be decoded")
        marker, at = data[match.end() - 1], match.end()
        if marker == 0xD9:
            return parts, at
        (size,) = struct.unpack_from(">H", data, at)
        if size < 2 or at + size > len(data):
            raise _invalid("image is truncated")
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            parts.append(data[at + 2 : at + size])
        at += size
        if marker == 0xDA:
            following = _MARKER.search(data, at)
            if following is None:
                raise _invalid("image is truncated")
            at = following.start()


def _png(data: bytes) -> Iterator[bytes]:
    at = 8
    while True:
        size, name = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        (crc,) = struct.unpack_from(">I", data, at + 8 + size)
        if zlib.crc32(body, zlib.crc32(name)) != crc:
            raise _invalid("image is damaged (a checksum does not fit)")
        at += size + 12
        if name not in (b"IDAT", b"fdAT", b"PLTE", b"iCCP"):
            yield body
        if name == b"IEND":
            break
    if at != len(data):
        raise _invalid("image has other bytes behind its end")


def _webp(data: bytes) -> Iterator[bytes]:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise _invalid("image is truncated")
    if size + 8 + size % 2 < len(data):
        raise _invalid("image has other bytes behind its end")
    at = 12
    while at < size + 8:
        name, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > len(data):
            raise _invalid("image is truncated")
        if name not in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF", b"ICCP"):
            yield data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
