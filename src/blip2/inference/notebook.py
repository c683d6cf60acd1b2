"""What a model says of pictures, as an object that a notebook shows: `model.show("dog.jpg")`.

One card per picture: the picture, its captions, answers, and on request where the model looked. No
script, no style sheet and nothing from elsewhere, so that a saved notebook shows the same anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.configs import DecodingConfig
from blip2.data.image_inputs import ImageLike
from blip2.explain.attention import Attention
from blip2.inference.types import Model
from blip2.io.figures import jpeg, overlay, png, seen
from blip2.ops.devices import to_numpy

_SIDE, _SMALL = 320, 112  # pixels of a picture, and of a word's map
_CARD = "flex:0 1 340px;min-width:0;margin:0;font:14px/1.45 system-ui,sans-serif"
_SOFT = "opacity:.75;font-size:12px"


@dataclass(frozen=True)
class Card:
    """What was found of one picture.

    Args:
        name: of the file; "image" of bytes and Pillow images.
        picture: as it is, in RGB.
        captions: best first.
        answers: questions with their answers.
        attention: where maps were asked for; see `Blip2.attend`.
        resize: how the image encoder saw the picture (`squash` or `crop`); maps lie over that view.
    """

    name: str
    picture: Image.Image
    captions: list[str]
    answers: list[tuple[str, str]] = field(default_factory=list)
    attention: Attention | None = None
    resize: str = "squash"

    def _repr_html_(self) -> str:
        return _page([self])

    def __repr__(self) -> str:
        lines = [f"{self.name}: {caption}" for caption in self.captions]
        lines += [f"{question} {answer}" for question, answer in self.answers]
        found = self.attention
        if found is not None and found.itc is not None:
            matched = "" if found.itm is None else f", ITM {found.itm:.3f}"
            lines.append(f"{found.text!r}: ITC {float(found.itc.max()):.3f}{matched}")
        return "\n".join(lines)


class Shown(Sequence[Card]):
    """Cards of several pictures: a notebook shows them side by side, a terminal as lines."""

    def __init__(self, cards: list[Card]) -> None:
        self.cards = cards

    def __len__(self) -> int:
        return len(self.cards)

    def __getitem__(self, index: Any) -> Any:
        return self.cards[index]

    def _repr_html_(self) -> str:
        return _page(self.cards)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.cards))


def show(
    model: Model,
    images: ImageLike | Sequence[ImageLike],
    questions: str | Sequence[str] = (),
    *,
    text: str | None = None,
    maps: bool | None = None,
    prompt: str | None = None,
    **options: Any,
) -> Shown:
    """Captions, answers and maps of B pictures; see `Blip2.show`."""
    from blip2.data.image_inputs import open_image

    given = [images] if isinstance(images, str | Path | bytes | Image.Image) else list(images)
    pictures = [open_image(image) for image in given]
    asked = [questions] if isinstance(questions, str) else list(questions)
    found = model.caption(pictures, prompt=prompt, decoding=DecodingConfig(**options))
    answers = model.ask_many(pictures, asked) if asked else [[] for _ in pictures]
    looked = maps if maps is not None else text is not None
    return Shown(
        [
            Card(
                Path(image).name if isinstance(image, str | Path) else "image",
                picture,
                captions if isinstance(captions, list) else [captions],
                list(zip(asked, replies, strict=True)),
                model.attend(picture, text) if looked else None,
                model.image_spec.resize,
            )
            for image, picture, captions, replies in zip(given, pictures, found, answers, strict=True)
        ]
    )


def _page(cards: list[Card]) -> str:
    inside = "".join(map(_card, cards))
    return f'<div style="display:flex;flex-wrap:wrap;gap:20px;align-items:flex-start">{inside}</div>'


def _card(card: Card) -> str:
    best = card.captions[0] if card.captions else card.name
    parts = [_image(jpeg(card.picture, _SIDE), best)]
    parts += [f'<div style="font-weight:600;margin-top:6px">{escape(caption)}</div>' for caption in card.captions]
    parts += [
        f'<div style="margin-top:6px"><span style="{_SOFT}">{escape(question)}</span><br>{escape(answer)}</div>'
        for question, answer in card.answers
    ]
    if card.attention is not None:
        parts += _maps(card, card.attention)
    parts.append(f'<div style="{_SOFT};overflow-wrap:anywhere">{escape(card.name)}</div>')
    return f'<figure style="{_CARD}">{"".join(parts)}</figure>'


def _maps(card: Card, found: Attention) -> list[str]:
    """What the scores with a text depend on, else where all queries look together; then each word of the caption."""
    view = seen(card.picture, card.resize, _SIDE)
    shown = []
    if found.itc is not None and found.itc_maps is not None:
        shown = [(f"ITC {float(found.itc.max()):.3f} with “{found.text}”", found.itc_maps.sum(0))]
        if found.itm_maps is not None:
            shown.append((f"ITM: fits with probability {found.itm:.2f}", found.itm_maps.sum(0)))
    else:
        shown = [("Where the queries look, mean over all", found.queries.mean(dim=(0, 1)))]
    parts = []
    for what, map_P in shown:
        parts.append(f'<div style="{_SOFT};margin-top:8px">{escape(what)}</div>')
        parts.append(_image(png(overlay(view, to_numpy(found.heatmap(map_P)))), f"heatmap: {what}"))
    if found.words is not None and found.word_maps is not None:
        small = view.resize((_SMALL, _SMALL))
        figures = [
            f'<figure style="margin:0;text-align:center;{_SOFT}">'
            f"{_image(png(overlay(small, to_numpy(found.heatmap(map_P)))), f'where “{word.strip()}” drew on')}"
            f"{escape(word.strip() or '_')}</figure>"
            for word, map_P in zip(found.words, found.word_maps, strict=True)
        ]
        parts.append(f'<div style="display:flex;flex-wrap:wrap;gap:6px;margin-top:8px">{"".join(figures)}</div>')
    return parts


def _image(source: str, alternative: str) -> str:
    style = "display:block;max-width:100%;border-radius:6px;margin:0"
    return f'<img src="{source}" alt="{escape(alternative)}" style="{style}">'
