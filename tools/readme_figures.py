"""What `tiny` says of three images, for the README: writes the images, their heatmaps, the table and the printed block.

    BLIP2_PRECISION=fp32 python -m tools.readme_figures     # run it again when `tiny` changes, then read the verdicts

The images come from scikit-image: `camera` (CC0, Lav Varshney), `chelsea` (CC0, Stefan van der Walt) and `rocket`
(public domain, SpaceX).
"""

from __future__ import annotations

import contextlib
import io
import re
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

import blip2
from blip2.io.figures import encoder_view, overlay
from blip2.ops.devices import to_numpy

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SOURCES = {"camera": "camera.png", "cat": "chelsea.png", "rocket": "rocket.jpg"}
QUESTION = "What is in the image?"
TEXTS = ["a man with a camera", "a cat", "a rocket in the sky", "a cup of coffee", "a motorcycle", "a dog in the grass"]
SIDE = 256  # pixels


def main() -> None:
    """Write the images, then fill in the README."""
    paths = copy_images()
    model = blip2.load("tiny")
    captions, answers = model.caption(paths), model.ask(paths, QUESTION)
    closest = [TEXTS[column] for column in model.similarity(paths, TEXTS).argmax(dim=1)]
    for name, path, text in zip(SOURCES, paths, closest, strict=True):
        attention = model.attend(path, text)
        assert attention.itc_maps is not None
        heatmap = to_numpy(attention.heatmap(attention.itc_maps.sum(dim=0)))
        view = encoder_view(Image.open(path).convert("RGB"), model.image_spec.resize, SIDE)
        overlay(view, heatmap).save(IMAGES / f"{name}-heatmap.jpg", quality=88)
    rows = [
        ["", *(image(f"{name}.jpg", name) for name in SOURCES)],
        ["---"] * (len(SOURCES) + 1),
        ["caption", *captions],
        [QUESTION, *answers],
        [f"closest of {len(TEXTS)} texts", *closest],
        ["heatmap of that text", *(image(f"{name}-heatmap.jpg", f"heatmap of {name}") for name in SOURCES)],
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    readme = ROOT / "README.md"
    text = re.sub(
        r"(<!-- examples -->\n).*?(<!-- /examples -->)", rf"\g<1>{table}\n\g<2>", readme.read_text("utf-8"), flags=re.S
    )
    readme.write_text(run_program(text), "utf-8")


def image(file: str, alt: str) -> str:
    """An image of docs/images as a table's cell shows it."""
    return f'<img src="docs/images/{file}" width="210" alt="{alt}">'


def copy_images() -> list[str]:
    """Squares of scikit-image's images below docs/images."""
    package = find_spec("skimage")
    assert package is not None
    assert package.submodule_search_locations
    IMAGES.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, source in SOURCES.items():
        original = Image.open(Path(package.submodule_search_locations[0]) / "data" / source).convert("RGB")
        path = IMAGES / f"{name}.jpg"
        encoder_view(original, "crop", SIDE).save(path, quality=90)
        paths.append(str(path))
    return paths


def run_program(readme: str) -> str:
    """The README with what its Python lines print in the block after them."""
    program = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, flags=re.S)
    assert program is not None, "README.md has no python block with a text block after it"
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        exec(program[1], {})
    start, end = program.span(2)
    return readme[:start] + printed.getvalue() + readme[end:]


if __name__ == "__main__":
    main()
