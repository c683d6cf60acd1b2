"""Where a JPEG, PNG or WebP begins and ends, and what it carries beside pixels.

Pillow is content with any bytes behind a picture, or inside its comments; a file that is a picture
and something else as well (an archive, a page, a script) is told by this look at its container.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_FOREIGN = re.compile(rb"<svg|<html|<script|<!doctype|<iframe|<\?php|<!entity|%pdf-|#!/", re.IGNORECASE)
_ARCHIVE_END = b"PK\x05\x06"


class ContainerError(ValueError):
    """What is wrong with the file; for the user."""


def check_container(data: bytes, kind: str) -> None:
    """Refuse what is cut short, goes on behind its end, or carries another format along.

    Raises:
        ContainerError: with the reason.
    """
    look = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp}[kind]
    try:
        for extra in look(data):
            if _FOREIGN.search(extra):
                raise ContainerError("image carries another document inside")
    except (IndexError, struct.error):
        raise ContainerError("image is truncated") from None
    end = data.rfind(_ARCHIVE_END, max(0, len(data) - 65557))
    if end >= 0 and len(data) - end >= 22 and end + 22 + struct.unpack_from("<H", data, end + 20)[0] == len(data):
        raise ContainerError("image is an archive as well")


def _jpeg(data: bytes) -> Iterator[bytes]:
    """The comment and application segments; further pictures behind the first are those of an MPO."""
    at = 0
    while True:
        parts, at = _jpeg_picture(data, at)
        yield from parts
        rest = data[at : at + 65536].lstrip(b"\0")
        padding = min(len(data) - at, 65536) - len(rest)
        if not rest and at + padding >= len(data):
            return
        if not rest.startswith(b"\xff\xd8\xff"):
            raise ContainerError("image has other bytes behind its end")
        at += padding


def _jpeg_picture(data: bytes, at: int) -> tuple[list[bytes], int]:
    parts: list[bytes] = []
    at += 2
    while True:
        found = _MARKER.match(data, at)
        if found is None:
            raise ContainerError("image is truncated" if at >= len(data) - 1 else "image cannot be decoded")
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:
            return parts, at
        (size,) = struct.unpack_from(">H", data, at)
        if size < 2 or at + size > len(data):
            raise ContainerError("image is truncated")
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            parts.append(data[at + 2 : at + size])
        at += size
        if marker == 0xDA:
            following = _MARKER.search(data, at)
            if following is None:
                raise ContainerError("image is truncated")
            at = following.start()


def _png(data: bytes) -> Iterator[bytes]:
    at = 8
    while True:
        size, name = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        (crc,) = struct.unpack_from(">I", data, at + 8 + size)
        if zlib.crc32(body, zlib.crc32(name)) != crc:
            raise ContainerError("image is damaged (a checksum does not fit)")
        at += size + 12
        if name not in (b"IDAT", b"fdAT", b"PLTE", b"iCCP"):
            yield body
        if name == b"IEND":
            break
    if at != len(data):
        raise ContainerError("image has other bytes behind its end")


def _webp(data: bytes) -> Iterator[bytes]:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise ContainerError("image is truncated")
    if size + 8 + size % 2 < len(data):
        raise ContainerError("image has other bytes behind its end")
    at = 12
    while at < size + 8:
        name, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > len(data):
            raise ContainerError("image is truncated")
        if name not in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF", b"ICCP"):
            yield data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
