"""What every page of ours is made with: jinja2 that escapes, and stops at a name it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.errors import RunError, os_error_as
from blip2.io.atomic import write_text

if TYPE_CHECKING:
    import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """Templates of a folder, with the style sheet that pages share."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: Path, **values: Any) -> str:
    """A template filled.

    Args:
        template: a jinja2 file; what it includes lies beside it or in this room.
        values: what its names stand for.
    """
    return environment(template.parent).get_template(template.name).render(**values)


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Write a page of a template; arguments and errors as of `render` and `write`."""
    write(path, render(template, **values))


def write(path: Path, page: str) -> None:
    """Replace a page whole; its folder is made.

    Raises:
        RunError: it cannot be written.
    """
    with os_error_as(RunError, f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
