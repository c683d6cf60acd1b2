"""What each query specialises in over a data set: as JSON, as lines, and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from blip2.data.collection import printable
from blip2.data.images import decode_image
from blip2.explain.query_statistics import Specialisation, Word
from blip2.io.figures import colours, encoder_view, png
from blip2.io.html import write_page
from blip2.ops.devices import to_list, to_numpy

_MAP, _THUMB, _SHOWN = 112, 132, 8  # sides on the page in pixels; queries on the terminal


def as_dict(result: Specialisation, data: str, model: str) -> dict[str, Any]:
    """The numbers of the JSON; queries in their own order, maps [L][P] as lists, rounded to 6 digits.

    Args:
        data, model: their names.
    """
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


def lines(summary: dict[str, Any]) -> list[str]:
    """What the terminal shows of what `as_dict` returns."""
    queries, patches = summary["queries"], summary["grid"][0] * summary["grid"][1]
    text = [f"{len(queries)} queries over {summary['images']} images and {summary['texts']} texts"]
    if bad := summary["bad"]:
        text.append(f"{len(bad)} samples left out, the first: {bad[0]['key']}: {bad[0]['reason']}")
    never = sum(query["wins"] == 0 for query in queries)
    text.append(
        f"wins are worth {summary['winners']:.1f} equal queries; {never} never win; "
        f"mean cosine {summary['mean_query_cosine']:.3f}"
    )
    for query in _by_wins(queries)[:_SHOWN]:
        words = ", ".join(word["word"] for word in query["own_words"]) or "no word stands out"
        text.append(
            f"query {query['query']:>2} wins {query['wins']:6.1%}, stands out in {query['stands_out']:6.1%}, "
            f"sees {query['spread']:5.1f} of {patches} patches ({query['places']:5.1f} over all images): {words}"
        )
    return text


def write_queries(path: Path, result: Specialisation, summary: dict[str, Any], resize: str) -> None:
    """Write the page.

    Args:
        summary: what `as_dict` returns.
        resize: how the encoder saw the images; maps lie over that view.

    Raises:
        RunError: it cannot be written.
    """
    rows = [
        query
        | {
            "map": png(_map(result, query["query"])),
            "bar": query["wins"] / float(result.wins.max()),
            "examples": [
                {
                    "caption": example.caption,
                    "z": example.z,
                    "image": result.overlay(
                        encoder_view(decode_image(example.sample.read()), resize, _THUMB), example.attention, share=0.45
                    ),
                }
                for example in result.examples[query["query"]]
            ],
        }
        for query in _by_wins(summary["queries"])
    ]
    write_page(path, Path(__file__).with_name("queries.html.j2"), result=summary, rows=rows)


def _by_wins(queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(queries, key=lambda query: (-query["wins"], -query["stands_out"], query["query"]))


def _map(result: Specialisation, query: int) -> Image.Image:
    """The mean map of a query over all layers, scaled so that its largest value is brightest."""
    heatmap = to_numpy(result.heatmap(result.maps[:, query].mean(dim=0)))
    scaled = colours(heatmap / max(float(heatmap.max()), 1e-12))
    return Image.fromarray(scaled).resize((_MAP, _MAP), Image.Resampling.NEAREST)
