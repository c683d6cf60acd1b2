"""`blip2 explain IMAGE [TEXT]` and `blip2 explain --data DATA`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from blip2.cli.options import Commands, add_json, add_model
from blip2.configs.checks import require
from blip2.errors import ConfigError


def add_parser(commands: Commands) -> None:
    """`blip2 explain`: one image, or the queries over a data set."""
    explain = commands.add_parser(
        "explain",
        help="where the queries look, and what the scores with a text depend on",
        description="One image: where each query looks, and what ITC and ITM make of a text. "
        "With --data: what each query specialises in over a data set.",
    )
    explain.add_argument("image", nargs="?", help="not with --data")
    explain.add_argument("text", nargs="?", help="shows what ITC and ITM make of it (needs stage 1)")
    explain.add_argument("--data", metavar="DATA", help="named set, shards, folder or JSONL file (needs stage 1)")
    explain.add_argument("--limit", type=int, metavar="N", help="of --data: first N images only")
    explain.add_argument("--out", metavar="REPORT.html", help="a page with the maps")
    add_json(explain, "one JSON object with all maps")
    add_model(explain)
    explain.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the model looks at; write the page where --out says."""
    if options.data:
        return _explain_queries(options)
    if options.image is None or options.limit is not None:
        raise ConfigError("nothing to explain: name an IMAGE, or a data set with --data DATA [--limit N]")
    from blip2.data.collection import printable
    from blip2.data.images import open_image
    from blip2.explain.report import as_dict, lines, write_attention
    from blip2.inference.loading import load_model

    image = open_image(options.image)
    model, name = load_model(options)
    attention = model.attend(image, options.text)
    if options.out:
        write_attention(Path(options.out), image, attention, printable(options.image), name, model.image_spec.resize)
    if options.json:
        print(json.dumps(as_dict(attention, options.image, name)))
    else:
        print("\n".join([*lines(attention), *([f"maps: {options.out}"] if options.out else [])]))
    return 0


def _explain_queries(options: argparse.Namespace) -> int:
    if options.image is not None:
        raise ConfigError("explain takes an IMAGE or --data DATA, not both")
    require(options.limit is None or options.limit >= 1, "--limit", options.limit, "1 or more")
    from blip2.data.sources import open_collection
    from blip2.explain.queries import as_dict, lines, write_queries
    from blip2.explain.query_statistics import specialisation
    from blip2.inference.loading import load_model

    data = open_collection(options.data).limited(options.limit)
    model, name = load_model(options)
    result = specialisation(model, data.samples, progress=len(data.samples) > 1)
    summary = as_dict(result, options.data, name)
    if options.out:
        write_queries(Path(options.out), result, summary, model.image_spec.resize)
    if options.json:
        print(json.dumps(summary))
    else:
        print("\n".join([*lines(summary), *([f"page: {options.out}"] if options.out else [])]))
    return 0
