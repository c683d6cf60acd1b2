"""`model.show`: what a notebook is given is what the model says, safe, and with nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import blip2
from blip2.errors import ConfigError
from blip2.inference import Blip2
from blip2.inference.notebook import Card, Shown

VOID = {"img", "br"}


@pytest.fixture(scope="module")
def stage1(tiny: Path) -> Blip2:
    return blip2.load(tiny, device="cpu")


@pytest.fixture(scope="module")
def stage2(tiny_opt: Path) -> Blip2:
    return blip2.load(tiny_opt, device="cpu")


def image(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


class Reader(HTMLParser):
    """Text and images; complains of tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.images: list[dict[str, str | None]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_captions_and_answers_are_the_models(stage2: Blip2) -> None:
    images = [image(0), image(1)]
    shown = stage2.show(images, ["what is it?", "where?"], beams=2, num=2)
    assert [card.captions for card in shown] == stage2.caption(images, beams=2, num=2)
    answers = stage2.ask_many(images, ["what is it?", "where?"])
    assert [[answer for _, answer in card.answers] for card in shown] == answers
    page = Reader(shown._repr_html_())
    for card in shown:
        for text in (*card.captions, *(part for turn in card.answers for part in turn)):
            assert text in page.text
            assert text in repr(shown)
    assert [image["alt"] for image in page.images] == [card.captions[0] for card in shown]


def test_maps_of_a_text(stage1: Blip2) -> None:
    shown = stage1.show(image(), text="a dog")
    attention = stage1.attend(image(), "a dog")
    html = shown._repr_html_()
    assert f"ITC {float(attention.itc.max()):.3f}" in html
    assert f"probability {attention.itm:.2f}" in html
    assert len(Reader(html).images) == 3  # the image, ITC, ITM
    assert "ITM" in repr(shown[0])


def test_maps_of_words_without_a_text(stage2: Blip2) -> None:
    card = stage2.show(image(), maps=True)[0]
    assert card.attention is not None
    assert card.attention.words
    assert len(Reader(card._repr_html_()).images) == 1 + 1 + len(card.attention.words)
    assert stage2.show(image())[0].attention is None


def test_a_page_has_nothing_from_elsewhere_and_no_markup_of_others(tmp_path: Path, stage1: Blip2) -> None:
    path = tmp_path / "<script>.png"
    image().save(path)
    attention = stage1.attend(image(), '"><script>alert(1)</script>')
    card = Card(path.name, image(), ["<b>bold</b>"], [("<i>?</i>", "'\"&")], attention)
    html = Shown([card])._repr_html_()
    assert "<script" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert re.findall(r"""(?:src|href)=["'](?!data:image/)""", html) == []
    assert "http" not in html
    assert "<script>.png" in Reader(html).text
    assert stage1.show(str(path))[0].name == path.name


def test_questions_need_stage_2(stage1: Blip2) -> None:
    with pytest.raises(ConfigError, match="stage-2"):
        stage1.show(image(), "what?")
