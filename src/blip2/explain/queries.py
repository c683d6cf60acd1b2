"""`blip2 explain --data`: what each query specialises in, as lines, JSON and a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.configs.checks import require
from blip2.data.collection import printable
from blip2.data.images import decode_image
from blip2.data.sources import open_collection
from blip2.errors import ConfigError
from blip2.explain.query_statistics import Example, Specialisation, Word, specialisation
from blip2.explain.types import Explainable
from blip2.io.figures import colours, png, seen
from blip2.io.html import write_page
from blip2.ops.devices import to_list, to_numpy

# The model that a command's options name, and that name.
Load = Callable[[argparse.Namespace], tuple[Explainable, str]]

_MAP, _THUMB, _SHOWN = 112, 132, 8  # sides on the page in pixels; queries on the terminal


def queries_command(options: argparse.Namespace, load: Load) -> int:
    """Look at a data set; the page is written where --out says."""
    if options.image is not None:
        raise ConfigError("explain takes an IMAGE or --data DATA, not both")
    require(options.limit is None or options.limit >= 1, "--limit", options.limit, "1 or more")
    data = open_collection(options.data).limited(options.limit)
    model, name = load(options)
    result = specialisation(model, data.samples, progress=len(data.samples) > 1)
    if options.out:
        write_queries(Path(options.out), result, model.image_spec.resize, options.data, name)
    print(json.dumps(as_dict(result, options.data, name)) if options.json else "\n".join(_lines(result, options.out)))
    return 0


def as_dict(result: Specialisation, data: str, model: str) -> dict[str, Any]:
    """All numbers; queries in their own order, maps [L][P] as lists, rounded to 6 digits."""
    return {
        "data": printable(data),
        "model": printable(model),
        "images": result.images,
        "texts": result.texts,
        "bad": [{"key": bad.key, "reason": bad.reason} for bad in result.bad],
        "grid": list(result.grid),
        "prefix": result.prefix,
        "layers": result.layers,
        "winners": round(result.winners, 4),
        "mean_query_cosine": round(result.mean_query_cosine, 6),
        "queries": [
            {
                "query": q,
                "wins": round(float(result.wins[q]), 6),
                "stands_out": round(float(result.stands_out[q]), 6),
                "spread": round(float(result.spread[q]), 4),
                "places": round(float(result.places[q]), 4),
                "on_prefix": round(float(result.on_prefix[q]), 6),
                "words": _words(result.words[q]),
                "own_words": _words(result.own_words[q]),
                "examples": [
                    {"key": e.sample.key, "caption": e.caption, "cosine": round(e.cosine, 4), "z": round(e.z, 3)}
                    for e in result.examples[q]
                ],
                "map": to_list(result.maps[:, q], 6),
            }
            for q in range(len(result.wins))
        ],
    }


def _words(words: list[Word]) -> list[dict[str, Any]]:
    return [{"word": word.word, "z": round(word.z, 3), "images": word.images} for word in words]


def order(result: Specialisation) -> list[int]:
    """Queries by the share of the texts that they win."""
    return sorted(range(len(result.wins)), key=lambda q: (-float(result.wins[q]), -float(result.stands_out[q]), q))


def _lines(result: Specialisation, out: str | None) -> list[str]:
    Q, patches = len(result.wins), result.grid[0] * result.grid[1]
    lines = [f"{Q} queries over {result.images} images and {result.texts} texts"]
    if result.bad:
        lines.append(f"{len(result.bad)} samples left out, the first: {result.bad[0].key}: {result.bad[0].reason}")
    never = int((result.wins == 0).sum())
    lines.append(
        f"wins are worth {result.winners:.1f} equal queries; {never} never win; "
        f"mean cosine {result.mean_query_cosine:.3f}"
    )
    for q in order(result)[:_SHOWN]:
        words = ", ".join(word.word for word in result.own_words[q]) or "no word stands out"
        shares = f"wins {float(result.wins[q]):6.1%}, stands out in {float(result.stands_out[q]):6.1%}"
        sees = f"{float(result.spread[q]):5.1f} of {patches} patches ({float(result.places[q]):5.1f} over all images)"
        lines.append(f"query {q:>2} {shares}, sees {sees}: {words}")
    return [*lines, *([f"page: {out}"] if out else [])]


def write_queries(path: Path, result: Specialisation, resize: str, data: str, model: str) -> None:
    """Write the page.

    Args:
        resize: how the encoder saw the images; maps lie over that view.
        data, model: their names.

    Raises:
        RunError: it cannot be written.
    """
    rows = [
        {
            "number": q,
            "map": png(_map(result, q)),
            "wins": float(result.wins[q]),
            "stands_out": float(result.stands_out[q]),
            "bar": float(result.wins[q] / result.wins.max()),
            "spread": float(result.spread[q]),
            "places": float(result.places[q]),
            "on_prefix": float(result.on_prefix[q]),
            "words": result.words[q],
            "own_words": result.own_words[q],
            "examples": [_example(result, example, resize) for example in result.examples[q]],
        }
        for q in order(result)
    ]
    names = {"data": printable(data), "model": printable(model)}
    patches = result.grid[0] * result.grid[1]
    write_page(path, Path(__file__).with_name("queries.html.j2"), result=result, rows=rows, patches=patches, **names)


def _map(result: Specialisation, query: int) -> Image.Image:
    """The mean map of a query over all layers, scaled so that its largest value is brightest."""
    heatmap = to_numpy(result.heatmap(result.maps[:, query].mean(dim=0)))
    scaled = colours(heatmap / max(float(heatmap.max()), 1e-12))
    return Image.fromarray(scaled).resize((_MAP, _MAP), Image.Resampling.NEAREST)


def _example(result: Specialisation, example: Example, resize: str) -> dict[str, Any]:
    view = seen(decode_image(example.sample.read()), resize, _THUMB)
    image = result.overlay(view, example.attention, share=0.45)
    return {"caption": example.caption, "z": example.z, "image": image}
