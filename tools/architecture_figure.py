"""Draws the architecture of BLIP-2 for the README and the documentation, once for light and once for dark pages.

python -m tools.architecture_figure     # writes docs/images/architecture-{light,dark}.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

WIDTH, HEIGHT = 820, 478
FROZEN, TRAINED = "frozen", "trained"
PALETTES = {
    "light": {
        "ink": "#1f2328",
        "soft": "#59636e",
        "line": "#8c959f",
        "card": "#f6f8fa",
        "frozen": "#ddf0ff",
        "frozen-line": "#2f81c7",
        "trained": "#ffe9d2",
        "trained-line": "#c9600a",
        "empty": "#ffffff",
    },
    "dark": {
        "ink": "#f0f6fc",
        "soft": "#a6b0bb",
        "line": "#6e7681",
        "card": "#1c222a",
        "frozen": "#12304d",
        "frozen-line": "#5aa9ee",
        "trained": "#4a2a0b",
        "trained-line": "#f0964a",
        "empty": "#0d1117",
    },
}
QUERIES, TOKENS, CELL = 3, 4, 15  # rows and columns of a mask, and a cell's side
Mask = Callable[[int, int], bool]  # row, column -> may it attend?


def is_query(index: int) -> bool:
    """Whether a row or column of a mask belongs to the queries; the others are text."""
    return index < QUERIES


OBJECTIVES: list[tuple[str, str, tuple[str, ...], Mask]] = [
    (
        "ITC",
        "image-text contrast",
        ("each side sees", "only itself", "", "which caption", "belongs to which", "image?"),
        lambda row, column: is_query(row) == is_query(column),
    ),
    (
        "ITM",
        "image-text matching",
        ("all see all", "", "", "does this pair", "match? Against", "hard negatives"),
        lambda row, column: True,
    ),
    (
        "ITG",
        "image-grounded text generation",
        ("text sees queries", "and earlier text", "", "write the caption", "from what the", "queries hold"),
        lambda row, column: is_query(column) if is_query(row) else column <= row,
    ),
]


class Drawing:
    """SVG elements in one palette."""

    def __init__(self, palette: dict[str, str]) -> None:
        self.palette = palette
        self.elements: list[str] = []

    def text(self, x: float, y: float, words: str, *, size: int = 15, ink: str = "ink", **style: str) -> None:
        """A line of text; `style` are further attributes, with _ for -."""
        attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.elements.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{self.palette[ink]}"{attributes}>{words}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, fill: str, line: str | None = None, radius: int = 8) -> None:
        """A rounded rectangle."""
        stroke = f' stroke="{self.palette[line]}" stroke-width="1.5"' if line else ""
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{self.palette[fill]}"{stroke}/>'
        )

    def part(self, x: float, y: float, w: float, h: float, name: str, detail: str, state: str) -> None:
        """A part of the model: frozen or trained, its name and what it is."""
        self.box(x, y, w, h, state, f"{state}-line")
        self.text(x + w / 2, y + 26, name, size=16, text_anchor="middle", font_weight="600")
        self.text(x + w / 2, y + 46, detail, size=13, ink="soft", text_anchor="middle")

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A straight arrow."""
        self.elements.append(
            f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{self.palette["line"]}" stroke-width="2" marker-end="url(#tip)"/>'
        )

    def mask(self, x: float, y: float, mask: Mask) -> None:
        """Who sees whom in self-attention: rows attend to the columns that are filled."""
        side = QUERIES + TOKENS
        for start, count, label in ((0, QUERIES, "queries"), (QUERIES, TOKENS, "text")):
            middle = (start + count / 2) * CELL
            self.text(x + middle, y - 6, label, size=11, ink="soft", text_anchor="middle")
            self.text(
                x - 6, y + middle, label, size=11, ink="soft", text_anchor="middle",
                transform=f"rotate(-90 {x - 6} {y + middle})",
            )  # fmt: skip
        for row in range(side):
            for column in range(side):
                fill = "trained-line" if mask(row, column) else "empty"
                self.elements.append(
                    f'<rect x="{x + column * CELL}" y="{y + row * CELL}" width="{CELL - 2}" height="{CELL - 2}" rx="2" '
                    f'fill="{self.palette[fill]}" stroke="{self.palette["line"]}" stroke-width="0.6"/>'
                )

    def svg(self) -> str:
        """The whole file."""
        tip = f'<path d="M0 0L8 4L0 8z" fill="{self.palette["line"]}"/>'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
                'font-family="-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">',
                "<title>BLIP-2: a frozen image encoder, a trained Q-Former with learned queries, a linear layer "
                "and a frozen language model; stage 1 trains ITC, ITM and ITG, each with its own self-attention mask"
                "</title>",
                '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto" '
                f'markerUnits="userSpaceOnUse">{tip}</marker></defs>',
                *self.elements,
                "</svg>\n",
            ]
        )


def architecture(palette: dict[str, str]) -> str:
    """The figure as SVG."""
    drawing = Drawing(palette)
    _model(drawing)
    _stage1(drawing)
    _legend(drawing)
    return drawing.svg()


def _model(drawing: Drawing) -> None:
    """Image to text, from left to right."""
    drawing.text(210, 24, "Stage 1 trains the Q-Former on image-text pairs", size=14, ink="soft", text_anchor="middle")
    drawing.text(636, 24, "Stage 2 teaches it to prompt the language model", size=14, ink="soft", text_anchor="middle")
    _image(drawing, 8, 66)
    drawing.arrow(88, 104, 112, 104)
    drawing.part(114, 66, 128, 76, "Image encoder", "ViT, DINOv2, CLIP", FROZEN)
    drawing.arrow(242, 104, 278, 104)
    drawing.part(280, 44, 206, 120, "Q-Former", "cross-attends to the image", TRAINED)
    for number in range(8):
        drawing.box(297 + number * 22, 104, 16, 16, "trained-line", radius=4)
    drawing.text(383, 144, "learned query tokens", size=13, ink="soft", text_anchor="middle")
    drawing.arrow(383, 194, 383, 168)
    drawing.text(383, 208, "text (stage 1)", size=13, ink="soft", text_anchor="middle")
    drawing.arrow(486, 104, 514, 104)
    drawing.part(516, 72, 84, 64, "Linear", "to prompts", TRAINED)
    drawing.arrow(600, 104, 634, 104)
    drawing.part(636, 66, 152, 76, "Language model", "OPT, T5, SmolLM2", FROZEN)
    drawing.arrow(712, 142, 712, 180)
    drawing.text(712, 198, "“a dog in the grass”", size=15, text_anchor="middle", font_style="italic")


def _image(drawing: Drawing, x: float, y: float) -> None:
    """A landscape: an image in, in as few strokes as possible."""
    drawing.box(x, y, 80, 76, "card", "line")
    colour = drawing.palette["line"]
    drawing.elements.append(f'<circle cx="{x + 58}" cy="{y + 20}" r="8" fill="{drawing.palette["trained-line"]}"/>')
    drawing.elements.append(
        f'<path d="M{x + 6} {y + 68}L{x + 30} {y + 32}L{x + 46} {y + 54}L{x + 56} {y + 42}L{x + 74} {y + 68}z" '
        f'fill="{colour}"/>'
    )


def _stage1(drawing: Drawing) -> None:
    """The three objectives of stage 1, each with its self-attention mask."""
    width, gap = 260, 14
    for number, (short, name, lines, mask) in enumerate(OBJECTIVES):
        x, y = 6 + number * (width + gap), 226
        drawing.box(x, y, width, 202, "card", "line")
        drawing.text(x + 16, y + 30, short, size=17, font_weight="700")
        drawing.text(x + 58, y + 30, name, size=13, ink="soft")
        drawing.mask(x + 30, y + 72, mask)
        for row, line in enumerate(lines):
            drawing.text(x + 146, y + 84 + row * 19, line, size=13, ink="ink" if row < 2 else "soft")


def _legend(drawing: Drawing) -> None:
    y = 448
    drawing.box(8, y, 20, 16, FROZEN, "frozen-line", radius=4)
    drawing.text(36, y + 13, "frozen: never changes", size=13, ink="soft")
    drawing.box(196, y, 20, 16, TRAINED, "trained-line", radius=4)
    drawing.text(224, y + 13, "trained", size=13, ink="soft")
    drawing.box(300, y, 16, 16, "trained-line", radius=3)
    drawing.text(324, y + 13, "the row may attend to the column", size=13, ink="soft")
    drawing.box(554, y, 16, 16, "empty", "line", radius=3)
    drawing.text(578, y + 13, "masked", size=13, ink="soft")


def main() -> None:
    """Write both variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, palette in PALETTES.items():
        (out / f"architecture-{name}.svg").write_text(architecture(palette), "utf-8")


if __name__ == "__main__":
    main()
