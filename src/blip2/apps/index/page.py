"""A page with the pictures that a search found: one file, nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from blip2.apps.index.search import Hit, read
from blip2.apps.pages import environment
from blip2.data.images import decode_image
from blip2.data.samples import BadSampleError, printable
from blip2.errors import RunError

THUMB = 320


def write_page(path: Path, hits: list[Hit], text: str | None, picture: Image.Image | None, what: str) -> None:
    """Write the page beside and rename.

    Raises:
        RunError: it cannot be written.
    """
    template = environment(Path(__file__).parent).get_template("hits.html.j2")
    shown = [
        {
            "hit": hit,
            "name": printable(Path(hit.path).name if hit.row.size < 0 else hit.key),
            "path": printable(hit.path),
            "image": _thumbnail(hit),
        }
        for hit in hits
    ]
    page = template.render(hits=shown, text=text, query=data_uri(picture) if picture else None, what=printable(what))
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(page, "utf-8", "replace")
        beside.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def data_uri(picture: Image.Image) -> str:
    """A thumbnail as a JPEG inside the page."""
    small = picture.copy()
    small.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _thumbnail(hit: Hit) -> str | None:
    data, _ = read(hit.row)
    if data is None:
        return None
    try:
        return data_uri(decode_image(data))
    except BadSampleError:
        return None
