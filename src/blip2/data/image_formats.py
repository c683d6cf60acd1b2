"""The kinds of image files: one table for folders, shards, decoding and the server."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class ImageFormat(NamedTuple):
    """A kind of image file.

    Args:
        name: Pillow's.
        suffix: that shards give their members of it.
        media_type: of those that shards keep as they are and that the server takes.
        signature: what their bytes begin with.
    """

    name: str
    suffix: str = ""
    media_type: str = ""
    signature: bytes = b""


# Rasters only: Pillow hands EPS to Ghostscript, which no downloaded file should reach.
FORMATS = (
    ImageFormat("JPEG", ".jpg", "image/jpeg", rb"\xff\xd8\xff"),
    ImageFormat("PNG", ".png", "image/png", rb"\x89PNG\r\n\x1a\n"),
    ImageFormat("WEBP", ".webp", "image/webp", rb"RIFF....WEBP"),
    *map(ImageFormat, ("GIF", "BMP", "TIFF", "MPO", "DIB", "JPEG2000", "PPM", "TGA", "ICO", "AVIF")),
)
SHARD_FORMATS = tuple(kind for kind in FORMATS if kind.media_type)
MEDIA_TYPES = tuple(kind.media_type for kind in SHARD_FORMATS)


# Films: what PyAV reads. A GIF is an image unless a data set calls it a film.
FILM_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"})

# What people have in place of an image that is decoded here, by its first bytes.
_OTHERS = {
    "HEIC: save it as JPEG": rb"....ftyp(heic|heix|heim|heis|hevc|mif1|msf1)",
    "AVIF, which this Pillow lacks": rb"....ftypavi[fs]",
    "JPEG XL: save it as JPEG": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "SVG: save it as PNG": rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg",
    "Photoshop's: save it as PNG": rb"8BPS",
    "raw data of a camera: save it as JPEG": rb"II\*\0....CR|FUJIFILMCCD-RAW|IIU\0|....ftypcrx",
    "a PDF: save its pages as PNG": rb"%PDF",
    "PostScript": rb"%!PS",
    "a web page": rb"\s*<(!doctype html|html|head|body)",
    "a film": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ",
    "a zip archive": rb"PK\x03\x04",
    "a pointer of Git LFS: `git lfs pull` fetches the file": rb"version https://git-lfs",
}


def other_kind(data: bytes) -> str:
    """What bytes are that no decoder here reads, and what to do; empty where that is not known."""
    flags = re.DOTALL | re.IGNORECASE
    return next((kind for kind, signature in _OTHERS.items() if re.match(signature, data[:1000], flags)), "")


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of image files (`.jpg`), in lower case: all that this Pillow has for these formats."""
    from PIL import Image

    names = {kind.name for kind in FORMATS}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in names)


def format_of(data: bytes) -> ImageFormat | None:
    """Which of `SHARD_FORMATS` an image has by its first bytes."""
    return next((kind for kind in SHARD_FORMATS if re.match(kind.signature, data, re.DOTALL)), None)
