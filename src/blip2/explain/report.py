"""Where a model looks in one image: as JSON, as lines, and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from blip2.data.collection import printable
from blip2.explain.attention import Attention
from blip2.io.figures import encoder_view, png
from blip2.io.html import write_page
from blip2.ops.devices import to_list

LARGE, SMALL = 280, 112  # sides of maps on the page


def as_dict(attention: Attention, image: str, model: str) -> dict[str, Any]:
    """All of `attention`; maps as nested lists, rounded to 6 digits."""
    values = {k: to_list(value, 6) if isinstance(value, Tensor) else value for k, value in vars(attention).items()}
    return {"image": printable(image), "model": model, "winner": attention.winner, **values}


def lines(attention: Attention) -> list[str]:
    """What the terminal shows."""
    L, Q, P = attention.queries.shape
    text = [f"{Q} queries, cross-attention in {L} layers {attention.layers}, {P} image tokens"]
    on_prefix = _on_prefix(attention, attention.queries)
    text.append(f"{on_prefix:.0%} of the attention is on the {attention.prefix} token(s) before the patches")
    if attention.itc is not None:
        order = to_list(attention.itc.argsort(descending=True)[:5])
        text.append("ITC " + ", ".join(f"query {q} {float(attention.itc[q]):.3f}" for q in order))
        text.append("ITM: this model never learned it" if attention.itm is None else f"ITM {attention.itm:.3f}")
    if attention.caption is not None:
        text.append(f"caption: {attention.caption}")
    if attention.words is not None and attention.word_prompts is not None:
        shares = to_list(attention.word_prompts.sum(dim=1))
        words = [f"{word.strip() or '_'} {share:.0%}" for word, share in zip(attention.words, shares, strict=True)]
        text.append("attention to the soft prompts: " + ", ".join(words))
    return text


def _on_prefix(attention: Attention, maps: Tensor) -> float:
    """Share of the attention of maps [..., P] that is on the tokens before the patches."""
    return float(maps[..., : attention.prefix].sum(dim=-1).mean())


def write_attention(path: Path, image: Image.Image, attention: Attention, name: str, model: str, resize: str) -> None:
    """Write the page.

    Args:
        name, model: of the image and of the model.
        resize: how the encoder saw the image; maps lie over that view.

    Raises:
        RunError: it cannot be written.
    """
    view = encoder_view(image, resize, LARGE)
    small = view.resize((SMALL, SMALL))
    shares = [] if attention.word_prompts is None else to_list(attention.word_prompts.sum(dim=1))
    write_page(
        path,
        Path(__file__).with_name("explain.html.j2"),
        image=name,
        model=printable(model),
        attention=attention,
        view=png(view),
        on_prefix=_on_prefix(attention, attention.queries),
        scores=_scores(view, small, attention),
        queries=_queries(small, attention),
        words=list(zip(attention.word_overlays(small), shares, strict=True)),
    )


def _scores(view: Image.Image, small: Image.Image, attention: Attention) -> list[dict[str, Any]]:
    """What ITC and ITM depend on: all layers together, then each."""
    scores = []
    if attention.itc is not None and attention.itc_maps is not None:
        scores.append(("ITC", f"{float(attention.itc.max()):.3f}", attention.itc_maps))
    if attention.itm is not None and attention.itm_maps is not None:
        scores.append(("ITM", f"probability {attention.itm:.3f}", attention.itm_maps))
    return [
        {
            "name": name,
            "value": value,
            "image": attention.overlay(view, maps_LP.sum(0)),
            "layers": [
                (n, attention.overlay(small, map_P)) for n, map_P in zip(attention.layers, maps_LP, strict=True)
            ],
        }
        for name, value, maps_LP in scores
    ]


def _queries(small: Image.Image, attention: Attention) -> list[dict[str, Any]]:
    """One row per query, best for the text first; one map per layer."""
    itc, Q = attention.itc, attention.queries.shape[1]
    return [
        {
            "number": q,
            "cosine": None if itc is None else f"{float(itc[q]):.3f}",
            "maps": [attention.overlay(small, map_QP[q]) for map_QP in attention.queries],
        }
        for q in (range(Q) if itc is None else to_list(itc.argsort(descending=True)))
    ]
