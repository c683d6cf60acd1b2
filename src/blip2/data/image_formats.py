"""The kinds of image files: one table for folders, shards, decoding and the server."""

from __future__ import annotations

import re
from typing import NamedTuple


class ImageFormat(NamedTuple):
    """A kind of image file.

    Args:
        name: Pillow's.
        suffixes: in lower case; files of these are found in folders.
        media_type: of those that shards keep as they are and that the server takes.
        signature: what their bytes begin with.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    media_type: str = ""
    signature: bytes = b""


# Rasters only: Pillow hands EPS to Ghostscript, which no downloaded file should reach.
FORMATS = (
    ImageFormat("JPEG", (".jpg", ".jpeg"), "image/jpeg", rb"\xff\xd8\xff"),
    ImageFormat("PNG", (".png",), "image/png", rb"\x89PNG\r\n\x1a\n"),
    ImageFormat("WEBP", (".webp",), "image/webp", rb"RIFF....WEBP"),
    ImageFormat("GIF", (".gif",)),
    ImageFormat("BMP", (".bmp",)),
    ImageFormat("TIFF", (".tif", ".tiff")),
    *map(ImageFormat, ("MPO", "DIB", "JPEG2000", "PPM", "TGA", "ICO", "AVIF")),
)
SUFFIXES = tuple(suffix for kind in FORMATS for suffix in kind.suffixes)
SHARD_FORMATS = tuple(kind for kind in FORMATS if kind.media_type)
MEDIA_TYPES = tuple(kind.media_type for kind in SHARD_FORMATS)


def format_of(data: bytes) -> ImageFormat | None:
    """Which of `SHARD_FORMATS` an image has by its first bytes."""
    return next((kind for kind in SHARD_FORMATS if re.match(kind.signature, data, re.DOTALL)), None)
