"""`blip2 data`: what is in a data set and what in it is bad; public data sets to shards."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from blip2.cli.options import Commands, add_json
from blip2.data.convert.readers import READERS
from blip2.errors import ConfigError


def add_parser(commands: Commands) -> None:
    """`blip2 data check|convert`."""
    data = commands.add_parser("data", help="look after data sets")
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    check = commands.add_parser("check", help="decode every image, list every bad sample with its reason")
    check.add_argument("path", help="named set, shards, folder or JSONL file")
    add_json(check)
    check.set_defaults(run=run_check)
    convert = commands.add_parser(
        "convert",
        help="public data sets to shards, with checksums and a manifest",
        description="Reads a data set as it is downloaded, looks at every image, writes WebDataset shards, "
        "manifest.json and left_out.jsonl. Run it again and it goes on where it was.",
    )
    convert.add_argument("source", metavar="SOURCE", help="annotation file, or the folder that holds it")
    convert.add_argument("out", metavar="OUT", help="folder of the shards")
    convert.add_argument("--from", dest="kind", required=True, metavar="KIND", help=", ".join(READERS))
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
    add_json(convert, "the manifest")
    convert.set_defaults(run=run_convert)


def run_check(options: argparse.Namespace) -> int:
    """Print the report of a data set; exit code 0 also when it has bad samples (training skips them)."""
    from blip2.data.check import check_collection, format_report

    report = check_collection(options.path, progress=not options.json)
    if options.json:
        print(json.dumps({**dataclasses.asdict(report), "by_reason": report.by_reason()}))
    else:
        print(format_report(report))
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """Convert a public data set to shards; prints what was written and what was left out."""
    from blip2.data.convert.pipeline import convert
    from blip2.data.convert.records import Options, Request, ShardSize
    from blip2.data.image_files import images_below

    request = Request(
        Path(options.source).expanduser(),
        Path(options.images).expanduser() if options.images else None,
        options.split,
        ShardSize.parse(options.shard_size),
        _columns(options.columns),
    )
    rule = Options(
        options.kind,
        options.licence,
        options.drop_duplicates,
        tuple(options.against),
        options.threshold,
        options.skip_missing,
        options.workers,
        progress=not options.json,
    )
    manifest = convert(request, Path(options.out), rule)
    if options.kind == "folder" and (note := images_below(request.source).note()):
        print(note, file=sys.stderr)
    print(json.dumps(manifest) if options.json else _summary(manifest, options.out))
    return 0


def _columns(text: str) -> dict[str, str]:
    """From `image=path,caption=text`."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(name and value for name, _, value in pairs):
        raise ConfigError(f"columns is {text!r}: it must be like image=path,caption=text")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _summary(manifest: dict[str, Any], out: str) -> str:
    lines = [
        f"{out}: {manifest['samples']} samples in {len(manifest['shards'])} shards ({manifest['bytes'] / 1e6:.1f} MB), "
        f"{manifest['captions']} captions, {manifest['questions']} questions"
    ]
    lines += [f"  {count:>7}  left out: {reason}" for reason, count in manifest["bad"].items()]
    duplicates = manifest["near_duplicates"]
    if duplicates["found"]:
        fate = "dropped" if duplicates["dropped"] else "kept (--drop-duplicates leaves them out)"
        lines.append(f"  {duplicates['found']:>7}  near-duplicates of earlier images: {fate}")
    lines += [f"  {count:>7}  images of {spec}: dropped" for spec, count in manifest["leaks"].items()]
    return "\n".join(lines)
