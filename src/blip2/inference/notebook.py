"""Captions, answers and heatmaps of images as an object that a notebook shows: `model.show("dog.jpg")`.

One card per image. No script, no style sheet and nothing from elsewhere, so that a saved notebook shows the same
anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from PIL import Image

from blip2.explain.attention import Attention
from blip2.io.figures import jpeg, seen

_SIDE, _SMALL = 320, 112  # pixels of an image, and of a word's map
_CARD = "flex:0 1 340px;min-width:0;margin:0;font:14px/1.45 system-ui,sans-serif"
_SOFT = "opacity:.75;font-size:12px"


@dataclass(frozen=True)
class Card:
    """What a model says of one image.

    Args:
        name: of the file; "image" of bytes and Pillow images.
        picture: the whole image in RGB.
        captions: best first.
        answers: questions with their answers.
        attention: see `Blip2.attend`; None where no maps were asked for.
        resize: how the image encoder saw the image (`squash` or `crop`); maps lie over that view.
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
        attention = self.attention
        if attention is not None and attention.itc is not None:
            itm = "" if attention.itm is None else f", ITM {attention.itm:.3f}"
            lines.append(f"{attention.text!r}: ITC {float(attention.itc.max()):.3f}{itm}")
        return "\n".join(lines)


class Shown(Sequence[Card]):
    """Cards of several images: a notebook shows them side by side, a terminal as lines."""

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


def _maps(card: Card, attention: Attention) -> list[str]:
    """What the scores with a text depend on, else where all queries look together; then each word of the caption."""
    view = seen(card.picture, card.resize, _SIDE)
    if attention.itc is not None and attention.itc_maps is not None:
        maps = [(f"ITC {float(attention.itc.max()):.3f} with “{attention.text}”", attention.itc_maps.sum(0))]
        if attention.itm_maps is not None:
            maps.append((f"ITM: fits with probability {attention.itm:.2f}", attention.itm_maps.sum(0)))
    else:
        maps = [("Where the queries look, mean over all", attention.queries.mean(dim=(0, 1)))]
    parts = []
    for title, map_P in maps:
        parts.append(f'<div style="{_SOFT};margin-top:8px">{escape(title)}</div>')
        parts.append(_image(attention.overlay(view, map_P), f"heatmap: {title}"))
    if attention.words is not None and attention.word_maps is not None:
        small = view.resize((_SMALL, _SMALL))
        figures = [
            f'<figure style="margin:0;text-align:center;{_SOFT}">'
            f"{_image(attention.overlay(small, map_P), f'where “{word.strip()}” drew on')}"
            f"{escape(word.strip() or '_')}</figure>"
            for word, map_P in zip(attention.words, attention.word_maps, strict=True)
        ]
        parts.append(f'<div style="display:flex;flex-wrap:wrap;gap:6px;margin-top:8px">{"".join(figures)}</div>')
    return parts


def _image(source: str, alternative: str) -> str:
    style = "display:block;max-width:100%;border-radius:6px;margin:0"
    return f'<img src="{source}" alt="{escape(alternative)}" style="{style}">'
