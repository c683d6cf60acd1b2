"""`blip2 explain --data`: what each query specialises in, as lines, JSON and a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from blip2.data.collection import printable
from blip2.data.images import decode_image
from blip2.data.sources import open_collection
from blip2.errors import ConfigError
from blip2.explain.query_statistics import Example, Specialisation, Word, specialisation
from blip2.explain.types import Explainable
from blip2.io.figures import colours, overlay, png, seen
from blip2.io.html import environment, write
from blip2.ops.devices import to_list, to_numpy

# The model that a command's options name, and that name.
Load = Callable[[argparse.Namespace], tuple[Explainable, str]]

_MAP, _THUMB, _SHOWN = 112, 132, 8  # sides on the page in pixels; queries on the terminal


def queries_command(options: argparse.Namespace, load: Load) -> int:
    """Look at a data set; the page is written where --out says."""
    if options.image is not None:
        raise ConfigError("explain takes an IMAGE or --data DATA, not both")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit is {options.limit}: it must be 1 or more")
    data = open_collection(options.data).limited(options.limit)
    model, name = load(options)
    found = specialisation(model, data.samples, progress=len(data.samples) > 1)
    if options.out:
        write_page(Path(options.out), found, model, options.data, name)
    print(json.dumps(as_dict(found, options.data, name)) if options.json else "\n".join(_lines(found, options.out)))
    return 0


def as_dict(found: Specialisation, data: str, model: str) -> dict[str, Any]:
    """Everything that was found; queries in their own order, maps [L][P] as lists, rounded to 6 digits."""
    return {
        "data": printable(data),
        "model": printable(model),
        "images": found.images,
        "texts": found.texts,
        "bad": [{"key": b.key, "reason": b.reason} for b in found.bad],
        "grid": list(found.grid),
        "prefix": found.prefix,
        "layers": found.layers,
        "winners": round(found.winners, 4),
        "mean_query_cosine": round(found.mean_query_cosine, 6),
        "queries": [
            {
                "query": q,
                "wins": round(float(found.wins[q]), 6),
                "stands_out": round(float(found.stands_out[q]), 6),
                "spread": round(float(found.spread[q]), 4),
                "places": round(float(found.places[q]), 4),
                "on_prefix": round(float(found.on_prefix[q]), 6),
                "words": _words(found.words[q]),
                "own_words": _words(found.own_words[q]),
                "examples": [
                    {"key": e.sample.key, "caption": e.caption, "cosine": round(e.cosine, 4), "z": round(e.z, 3)}
                    for e in found.examples[q]
                ],
                "map": _rounded(found.maps[:, q]),
            }
            for q in range(len(found.wins))
        ],
    }


def _words(words: list[Word]) -> list[dict[str, Any]]:
    return [{"word": word.word, "z": round(word.z, 3), "images": word.images} for word in words]


def _rounded(values: Tensor) -> Any:
    return to_list(np.round(to_numpy(values).astype(np.float64), 6))


def order(found: Specialisation) -> list[int]:
    """Queries by the share of the texts that they win."""
    return sorted(range(len(found.wins)), key=lambda q: (-float(found.wins[q]), -float(found.stands_out[q]), q))


def _lines(found: Specialisation, out: str | None) -> list[str]:
    Q, patches = len(found.wins), found.grid[0] * found.grid[1]
    lines = [f"{Q} queries over {found.images} images and {found.texts} texts"]
    if found.bad:
        lines.append(f"{len(found.bad)} samples left out, the first: {found.bad[0].key}: {found.bad[0].reason}")
    never = int((found.wins == 0).sum())
    lines.append(
        f"wins are worth {found.winners:.1f} equal queries; {never} never win; "
        f"mean cosine {found.mean_query_cosine:.3f}"
    )
    for q in order(found)[:_SHOWN]:
        words = ", ".join(word.word for word in found.own_words[q]) or "no word stands out"
        shares = f"wins {float(found.wins[q]):6.1%}, stands out in {float(found.stands_out[q]):6.1%}"
        sees = f"{float(found.spread[q]):5.1f} of {patches} patches ({float(found.places[q]):5.1f} over all images)"
        lines.append(f"query {q:>2} {shares}, sees {sees}: {words}")
    return [*lines, *([f"page: {out}"] if out else [])]


def write_page(path: Path, found: Specialisation, model: Explainable, data: str, name: str) -> None:
    """Write the page beside and rename.

    Raises:
        RunError: it cannot be written.
    """
    template = environment(Path(__file__).parent).get_template("queries.html.j2")
    resize, most = model.image_spec.resize, float(found.wins.max())
    rows = [
        {
            "number": q,
            "map": png(_plain(found, found.maps[:, q].mean(dim=0))),
            "wins": float(found.wins[q]),
            "stands_out": float(found.stands_out[q]),
            "bar": float(found.wins[q]) / most,
            "spread": float(found.spread[q]),
            "places": float(found.places[q]),
            "on_prefix": float(found.on_prefix[q]),
            "words": found.words[q],
            "own_words": found.own_words[q],
            "examples": [_example(found, example, resize) for example in found.examples[q]],
        }
        for q in order(found)
    ]
    page = template.render(
        found=found, rows=rows, data=printable(data), model=printable(name), patches=found.grid[0] * found.grid[1]
    )
    write(path, page)


def _plain(found: Specialisation, map_P: Tensor) -> Image.Image:
    """A map alone, scaled so that its largest value is brightest."""
    heatmap = _heatmap(found, map_P)
    return Image.fromarray(colours(heatmap / max(float(heatmap.max()), 1e-12))).resize(
        (_MAP, _MAP), Image.Resampling.NEAREST
    )


def _heatmap(found: Specialisation, map_P: Tensor) -> Any:
    """[h, w]: the patches of a map."""
    return to_numpy(map_P[found.prefix :].unflatten(0, found.grid))


def _example(found: Specialisation, example: Example, resize: str) -> dict[str, Any]:
    view = seen(decode_image(example.sample.read()), resize, _THUMB)
    return {
        "caption": example.caption,
        "cosine": example.cosine,
        "z": example.z,
        "image": png(overlay(view, _heatmap(found, example.attention), share=0.45)),
    }
