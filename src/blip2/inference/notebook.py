"""Captions, answers and heatmaps of images as an object that a notebook shows: `model.show("dog.jpg")`.

One card per image. No script, no style sheet and nothing from elsewhere, so that a saved notebook shows the same
anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.explain.attention import Attention
from blip2.io.figures import encoder_view, jpeg
from blip2.io.html import render

_SIDE, _SMALL = 320, 112  # pixels of an image, and of a word's map


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
        return _html([self])

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
        return _html(self.cards)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.cards))


def _html(cards: list[Card]) -> str:
    return render(Path(__file__).with_name("notebook.html.j2"), cards=[_card(card) for card in cards])


def _card(card: Card) -> dict[str, Any]:
    """A card as the template shows it.

    Its maps are what the scores with a text depend on, else where all queries look together; then each word of the
    caption.
    """
    overlays: list[tuple[str, str]] = []
    words: list[tuple[str, str]] = []
    attention = card.attention
    if attention is not None:
        view = encoder_view(card.picture, card.resize, _SIDE)
        if attention.itc is not None and attention.itc_maps is not None:
            maps = [(f"ITC {float(attention.itc.max()):.3f} with “{attention.text}”", attention.itc_maps.sum(0))]
        else:
            maps = [("Where the queries look, mean over all", attention.queries.mean(dim=(0, 1)))]
        if attention.itm_maps is not None:
            maps.append((f"ITM: fits with probability {attention.itm:.2f}", attention.itm_maps.sum(0)))
        overlays = [(title, attention.overlay(view, map_P)) for title, map_P in maps]
        words = attention.word_overlays(view.resize((_SMALL, _SMALL)))
    return {**vars(card), "jpeg": jpeg(card.picture, _SIDE), "maps": overlays, "words": words}
