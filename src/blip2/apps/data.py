"""`blip2 data`: what is in a data set and what in it is bad; public data sets to shards."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from blip2.data.check import check_collection, format_report
from blip2.errors import ConfigError


def check_command(path: str, *, as_json: bool) -> int:
    """Print the report of a data set; exit code 0 also when it has bad samples (training skips them)."""
    report = check_collection(path, progress=not as_json)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "by_reason": report.by_reason()}))
    else:
        print(format_report(report))
    return 0


def convert_command(options: argparse.Namespace) -> int:
    """Convert a public data set to shards; prints what was written and what was left out."""
    from blip2.data.convert.options import Options
    from blip2.data.convert.run import convert
    from blip2.data.convert.units import Request, ShardSize

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
    found = manifest["near_duplicates"]
    if found["found"]:
        what = "dropped" if found["dropped"] else "kept (--drop-duplicates leaves them out)"
        lines.append(f"  {found['found']:>7}  near-duplicates of earlier images: {what}")
    lines += [f"  {count:>7}  images of {spec}: dropped" for spec, count in manifest["leaks"].items()]
    return "\n".join(lines)
