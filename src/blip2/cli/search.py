"""`blip2 search INDEX [TEXT]`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.cli.index import INDEX_MODEL, model_of
from blip2.cli.options import Commands, add_json, add_model
from blip2.errors import ConfigError

if TYPE_CHECKING:
    from blip2.search.query import Hit


def add_parser(commands: Commands) -> None:
    """`blip2 search`."""
    search = commands.add_parser("search", help="find images by text, by image, or both")
    search.add_argument("index", metavar="INDEX")
    search.add_argument("text", nargs="?", help='what to see: "two dogs in the snow"')
    search.add_argument("--image", metavar="IMAGE", help="find images like this one")
    search.add_argument("--k", type=int, default=20, help="images to find (default: %(default)s)")
    search.add_argument(
        "--rerank",
        type=int,
        metavar="N",
        help="best N re-ranked by ITM; 0 for none (default: 128, or 0 where the model never learned ITM)",
    )
    search.add_argument(
        "--in", dest="within", choices=("images", "captions", "both"), default="images", help="(default: images)"
    )
    add_json(search, "one JSON object per image")
    search.add_argument("--out", metavar="FILE.html", help="a page with the images")
    add_model(search, INDEX_MODEL)
    search.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Find images; exit code 0 also where there is none."""
    from blip2.data.images import open_image
    from blip2.search.query import Index
    from blip2.search.report import write_page
    from blip2.search.store import Store

    store = Store(options.index)
    image = open_image(options.image) if options.image else None
    if image is None and not (options.text or "").strip():
        raise ConfigError("nothing to search for: give a text, --image IMAGE, or both")
    index = Index(store, model_of(store, options))
    hits = index.search(
        options.text, image, k=options.k, rerank=options.rerank, within=options.within, progress=sys.stderr.isatty()
    )
    if options.out:
        write_page(Path(options.out), hits, options.text, image, f"{len(index)} images of {store.path.name}")
    for rank, hit in enumerate(hits, 1):
        print(json.dumps(_as_dict(hit)) if options.json else _line(rank, hit))
    gone = sum(hit.state != "ok" for hit in hits)
    if gone:
        print(
            f"blip2: {gone} of {len(hits)} are gone or changed: `blip2 index add {store.path} FOLDER` follows files "
            "that moved, `index remove --gone` forgets them",
            file=sys.stderr,
        )
    return 0


def _as_dict(hit: Hit) -> dict[str, Any]:
    """A hit as JSON holds it."""
    from blip2.data.collection import printable

    parts = {name: round(value, 5) for name, value in hit.parts.items()}
    entry = asdict(hit) | {"path": printable(hit.path), "score": round(hit.score, 5), "parts": parts}
    del entry["row"]
    return entry


def _line(rank: int, hit: Hit) -> str:
    from blip2.data.collection import printable

    name = hit.path if hit.row.size < 0 else f"{hit.path}:{hit.key}"
    parts = " ".join(f"{part} {value:.3f}" for part, value in hit.parts.items())
    state = "" if hit.state == "ok" else f"  [{hit.state}]"
    caption = f"  {hit.caption}" if hit.caption else ""
    return printable(f"{rank:>3}  {hit.score:7.3f}  {name}  ({parts}){state}{caption}")
