"""A page with the images of a search result: one file that loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from blip2.data.collection import BadSampleError, printable
from blip2.data.images import decode_image
from blip2.io import html
from blip2.io.figures import jpeg
from blip2.search.query import Hit, read

THUMB = 320


def write_page(path: Path, hits: list[Hit], text: str | None, image: Image.Image | None, subtitle: str) -> None:
    """Write the page.

    Args:
        text, image: what was searched for.
        subtitle: what was searched, after the number of hits.

    Raises:
        RunError: it cannot be written.
    """
    shown = [
        {
            "hit": hit,
            "name": printable(Path(hit.path).name if hit.row.size < 0 else hit.key),
            "path": printable(hit.path),
            "image": _thumbnail(hit),
        }
        for hit in hits
    ]
    query, template = jpeg(image, THUMB) if image else None, Path(__file__).with_name("hits.html.j2")
    html.write_page(path, template, hits=shown, text=text, query=query, what=printable(subtitle))


def _thumbnail(hit: Hit) -> str | None:
    data, _ = read(hit.row)
    if data is None:
        return None
    try:
        return jpeg(decode_image(data), THUMB)
    except BadSampleError:
        return None
