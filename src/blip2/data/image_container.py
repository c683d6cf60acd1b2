"""The bytes of a JPEG, PNG or WebP that decide about its pixels, without metadata and without what follows its end.

Phones and cameras write films, thumbnails and padding behind an image, editors write megabytes of text into it, and
either may be damaged while every pixel is whole. A decoder that is given only these bytes cannot stumble over the
rest, and a file that is an image and something else as well (an archive, a page) reaches it as the image alone.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field

# A marker of a JPEG; 0xFF00 and restarts belong to the coded pixels.
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
# Its last two bytes, to search for: a pattern that begins with one certain byte is found ten times as fast.
_NEXT = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE, _COMMENT = 0xDA, 0xD9, 0xFE
_APPLICATION = range(0xE0, 0xF0)
# What colours and orientation are read from, JFIF's, Exif's and Adobe's, and how long they are at least.
_NAMES = {0xE0: b"JFIF\0", 0xE1: b"Exif\0", 0xEE: b"Adobe"}
_SHORTEST = {0xE0: 16, 0xE1: 10, 0xEE: 14}
# Chunks of a PNG beside the critical ones, whose names begin with a capital: transparency and orientation.
_PNG_CHUNKS = (b"tRNS", b"eXIf")
# What is coded, and so is no text: colour profiles and the frames of animations.
_PNG_PIXELS = (b"fdAT", b"iCCP")
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANMF", b"ICCP")


class ContainerError(ValueError):
    """What is wrong with the file; for the user."""


@dataclass
class Container:
    """A file taken apart.

    Args:
        pixels: the same image without anything that its pixels do not depend on. Of several images in one file (MPO)
            it is the first, of an animated PNG the default image.
        metadata: the bodies of its comments and of all that carries no pixels, those kept for their orientation or
            colours included.
        rest: what lies behind the end of the first image.
    """

    pixels: bytes = b""
    metadata: list[bytes] = field(default_factory=list)
    rest: bytes = b""


def take_apart(data: bytes, kind: str) -> Container:
    """A JPEG, PNG or WebP without what its pixels do not depend on.

    Args:
        kind: Pillow's name of the format; files of others come back as pixels alone.

    Raises:
        ContainerError: truncated, damaged where its pixels are, or its segments cannot be followed.
    """
    reader = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp}.get(kind)
    try:
        return Container(data) if reader is None else reader(data)
    except (IndexError, struct.error):
        raise ContainerError("image is truncated") from None


def _jpeg(data: bytes) -> Container:
    """Start to end of the first image; of its application segments only JFIF's, Exif's and Adobe's."""
    file, kept, at = Container(), [data[:2]], 2
    while True:
        marker_at = _MARKER.match(data, at)
        if marker_at is None:
            raise ContainerError("image is truncated" if at >= len(data) - 1 else "image cannot be decoded")
        marker, body = data[marker_at.end() - 1], marker_at.end()
        if marker == _END_OF_IMAGE:
            file.pixels, file.rest = b"".join([*kept, b"\xff\xd9"]), data[body:]
            return file
        (size,) = struct.unpack_from(">H", data, body)
        end = body + size
        if size < 2 or end > len(data):
            raise ContainerError("image is truncated")
        if marker == _START_OF_SCAN:
            following = _NEXT.search(data, end)
            if following is None:
                raise ContainerError("image is truncated")
            end = following.start()
            while data[end - 1] == 0xFF:  # a marker may begin with several
                end -= 1
        describes = marker == _COMMENT or marker in _APPLICATION
        if describes:
            file.metadata.append(data[body + 2 : end])
        if not describes or (size >= _SHORTEST.get(marker, size + 1) and data.startswith(_NAMES[marker], body + 2)):
            kept.append(data[at:end])
        at = end


def _png(data: bytes) -> Container:
    """Signature to IEND with the critical chunks, and others for transparency and orientation where they are whole."""
    file, kept, at, name = Container(), [data[:8]], 8, b""
    while name != b"IEND":
        size, name = struct.unpack_from(">I4s", data, at)
        end = at + size + 12
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        whole = zlib.crc32(memoryview(data)[at + 4 : end - 4]) == checksum
        critical = not name[0] & 0x20
        if critical and not whole:
            raise ContainerError("image is damaged (a checksum does not fit)")
        if not critical and name not in _PNG_PIXELS:
            file.metadata.append(data[at + 8 : end - 4])
        if critical or (whole and name in _PNG_CHUNKS and (name != b"tRNS" or _is_transparency(data, size))):
            kept.append(data[at:end])
        at = end
    file.pixels, file.rest = b"".join(kept), data[at:]
    return file


def _is_transparency(data: bytes, size: int) -> bool:
    """Whether a PNG of this header can have so many bytes of transparency."""
    colour_type = data[25]
    return size == {0: 2, 2: 6}.get(colour_type) or (colour_type == 3 and 1 <= size <= 256)


def _webp(data: bytes) -> Container:
    """The RIFF file of its own length; of its chunks all but XMP's."""
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise ContainerError("image is truncated")
    file, kept, at = Container(), [data[8:12]], 12
    while at < size + 8:
        name, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > len(data):
            raise ContainerError("image is truncated")
        end = min(at + 8 + length + length % 2, size + 8)
        if name not in _WEBP_PIXELS:
            file.metadata.append(data[at + 8 : at + 8 + length])
        if name != b"XMP ":
            kept.append(data[at:end])
        at = end
    body = b"".join(kept)
    file.pixels, file.rest = data[:4] + struct.pack("<I", len(body)) + body, data[size + 8 + size % 2 :]
    return file
