"""`blip2 explain`: numbers on the terminal or as JSON, maps on a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from blip2.data.collection import printable
from blip2.data.image_inputs import open_image
from blip2.errors import ConfigError
from blip2.explain.attention import Attention, attend
from blip2.explain.queries import Load, queries_command
from blip2.io.figures import overlay, png, seen
from blip2.io.html import environment, write
from blip2.ops.devices import to_list, to_numpy

LARGE, SMALL = 280, 112  # sides of maps on the page


def explain_command(options: argparse.Namespace, load: Load) -> int:
    """Explain one image, or with --data the queries; the page is written where --out says.

    Args:
        load: the model that the options name, and that name.
    """
    if options.data:
        return queries_command(options, load)
    if options.image is None or options.limit is not None:
        raise ConfigError("nothing to explain: name an IMAGE, or a data set with --data DATA [--limit N]")
    picture = open_image(options.image)
    model, name = load(options)
    found = attend(model, picture, options.text)
    if options.out:
        write_page(Path(options.out), picture, found, printable(options.image), name, model.image_spec.resize)
    print(json.dumps(as_dict(found, options.image, name)) if options.json else "\n".join(_lines(found, options.out)))
    return 0


def as_dict(found: Attention, image: str, model: str) -> dict[str, Any]:
    """Everything that was found; maps as nested lists, rounded to 6 digits."""
    values = {name: _plain(value) for name, value in vars(found).items()}
    return {"image": printable(image), "model": model, "winner": found.winner, **values}


def _plain(value: Any) -> Any:
    return to_list(np.round(to_numpy(value).astype(np.float64), 6)) if isinstance(value, Tensor) else value


def _lines(found: Attention, out: str | None) -> list[str]:
    L, Q, P = found.queries.shape
    on_prefix = float(found.queries[..., : found.prefix].sum(dim=-1).mean())
    lines = [f"{Q} queries, cross-attention in {L} layers {found.layers}, {P} image tokens"]
    lines.append(f"{on_prefix:.0%} of the attention is on the {found.prefix} token(s) before the patches")
    if found.itc is not None:
        order = to_list(found.itc.argsort(descending=True)[:5])
        lines.append("ITC " + ", ".join(f"query {q} {float(found.itc[q]):.3f}" for q in order))
        lines.append("ITM: this model never learned it" if found.itm is None else f"ITM {found.itm:.3f}")
    if found.caption is not None:
        lines.append(f"caption: {found.caption}")
    if found.words is not None and found.word_prompts is not None:
        shares = to_list(found.word_prompts.sum(dim=1))
        words = [f"{word.strip() or '_'} {share:.0%}" for word, share in zip(found.words, shares, strict=True)]
        lines.append("attention to the soft prompts: " + ", ".join(words))
    return [*lines, *([f"maps: {out}"] if out else [])]


def write_page(path: Path, picture: Image.Image, found: Attention, image: str, model: str, resize: str) -> None:
    """Write the page beside and rename.

    Args:
        resize: how the encoder saw the picture; maps lie over that view.

    Raises:
        RunError: it cannot be written.
    """
    template = environment(Path(__file__).parent).get_template("explain.html.j2")
    view = seen(picture, resize, LARGE)
    page = template.render(
        image=image,
        model=printable(model),
        found=found,
        view=png(view.resize((LARGE, LARGE))),
        on_prefix=float(found.queries[..., : found.prefix].sum(dim=-1).mean()),
        scores=_scores(view, found),
        queries=_queries(view, found),
        words=_words(view, found),
    )
    write(path, page)


def _map(view: Image.Image, found: Attention, map_P: Tensor, side: int) -> str:
    return png(overlay(view.resize((side, side)), to_numpy(found.heatmap(map_P))))


def _scores(view: Image.Image, found: Attention) -> list[dict[str, Any]]:
    """What ITC and ITM depend on: all layers together, then each."""
    shown = []
    for name, maps in (("ITC", found.itc_maps), ("ITM", found.itm_maps)):
        if maps is None or found.itc is None:
            continue
        value = f"{float(found.itc.max()):.3f}" if name == "ITC" else f"probability {found.itm:.3f}"
        layers = [(number, _map(view, found, row, SMALL)) for number, row in zip(found.layers, maps, strict=True)]
        shown.append({"name": name, "value": value, "image": _map(view, found, maps.sum(0), LARGE), "layers": layers})
    return shown


def _queries(view: Image.Image, found: Attention) -> list[dict[str, Any]]:
    """One row per query, best for the text first; one map per layer."""
    Q = found.queries.shape[1]
    order = range(Q) if found.itc is None else to_list(found.itc.argsort(descending=True))
    return [
        {
            "number": q,
            "cosine": None if found.itc is None else f"{float(found.itc[q]):.3f}",
            "maps": [_map(view, found, layer[q], SMALL) for layer in found.queries],
            "on_prefix": float(found.queries[:, q, : found.prefix].sum(dim=-1).mean()),
        }
        for q in order
    ]


def _words(view: Image.Image, found: Attention) -> list[dict[str, Any]]:
    if found.words is None or found.word_maps is None or found.word_prompts is None:
        return []
    rows = zip(found.words, found.word_maps, found.word_prompts, strict=True)
    return [
        {"word": word.strip() or "_", "image": _map(view, found, map_P, SMALL), "share": float(prompts_Q.sum())}
        for word, map_P, prompts_Q in rows
    ]
