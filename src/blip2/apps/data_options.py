"""Command-line options of `blip2 data`; imports nothing heavy."""

from __future__ import annotations

import argparse

Parsers = argparse._SubParsersAction
DATA_SETS = "coco, vg, cc3m, cc12m, sbu, laion, flickr30k, nocaps, vqav2, gqa, okvqa, table, jsonl or folder"


def add_command(commands: Parsers[argparse.ArgumentParser]) -> None:
    """`blip2 data check|convert`."""
    data = commands.add_parser("data", help="look after data sets")
    kinds = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    check = kinds.add_parser("check", help="decode every image, list every bad sample with its reason")
    check.add_argument("path", help="named set, shards, folder or JSONL file")
    check.add_argument("--json", action="store_true", help="one JSON object on stdout")
    check.set_defaults(run=_check)
    convert = kinds.add_parser(
        "convert",
        help="public data sets to shards, with checksums and a manifest",
        description="Reads a data set as it is downloaded, looks at every image, writes WebDataset shards, "
        "manifest.json and left_out.jsonl. Run it again and it goes on where it was.",
    )
    convert.add_argument("source", metavar="SOURCE", help="annotation file, or the folder that holds it")
    convert.add_argument("out", metavar="OUT", help="folder of the shards")
    convert.add_argument("--from", dest="kind", required=True, metavar="KIND", help=DATA_SETS)
    convert.add_argument("--images", metavar="DIR", help="folder of the images (default: that of the annotations)")
    convert.add_argument("--split", help="train, val, test, ... as the data set names it")
    convert.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    convert.add_argument("--shard-size", default="1000", metavar="N|MB", help="1000 samples, or 500MB of images")
    convert.add_argument("--licence", metavar="TEXT", help="of the data, for the manifest")
    convert.add_argument("--drop-duplicates", action="store_true", help="leave out near-duplicates of earlier images")
    convert.add_argument(
        "--against", nargs="+", default=[], metavar="EVALSET", help="leave out images of these data sets"
    )
    convert.add_argument("--threshold", type=int, default=6, help="bits of 64 in which copies differ at most")
    convert.add_argument("--skip-missing", action="store_true", help="go on where an annotated image is missing")
    convert.add_argument("--columns", default="", metavar="image=NAME,caption=NAME", help="of a table")
    convert.add_argument("--json", action="store_true", help="the manifest on stdout")
    convert.set_defaults(run=_convert)


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.apps.data import check_command

    return check_command(options.path, as_json=options.json)


def _convert(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.apps.data import convert_command

    return convert_command(options)
