"""What a conversion tells of its result: `manifest.json`, and `left_out.jsonl` with a line per finding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from blip2.data.collection import printable
from blip2.data.convert.duplicates import Decision
from blip2.data.convert.options import Options
from blip2.data.convert.records import Request
from blip2.data.convert.scan import Look
from blip2.errors import RunError, os_error_as
from blip2.io.atomic import write_json_lines

MANIFEST, REPORT = "manifest.json", "left_out.jsonl"


def manifest_of(
    request: Request, options: Options, looks: list[Look], decision: Decision, shards: list[dict[str, Any]]
) -> dict[str, Any]:
    total = Counter[str]()
    for record in shards:
        total.update({name: record[name] for name in ("samples", "captions", "questions", "bytes")})
    bad = Counter(reason for look in looks for _, reason in look.bad)
    return {
        "format": "webdataset",
        "kind": options.kind,
        "source": request.source.name,
        "split": request.split,
        "licence": options.licence,
        **total,
        "bad": dict(bad.most_common()),
        "near_duplicates": {"found": len(decision.duplicates), "dropped": options.drop_duplicates},
        "leaks": {spec: sum(leak[1] == spec for leak in decision.leaks.values()) for spec in options.against},
        "threshold_bits": options.threshold,
        "shards": [{name: value for name, value in record.items() if name != "plan"} for record in shards],
    }


def write_report(out: Path, looks: list[Look], decision: Decision) -> None:
    """`left_out.jsonl`: a line per bad sample, near-duplicate and leak."""
    lines = [{"key": key, "bad": reason} for look in looks for key, reason in look.bad]
    lines += decision.lines(looks)
    with os_error_as(RunError, f"{out / REPORT}: cannot be written"):
        write_json_lines(out / REPORT, lines)


def first_reason(looks: list[Look], decision: Decision) -> str:
    bad = next(((key, reason) for look in looks for key, reason in look.bad), None)
    if bad:
        return f"{printable(bad[0])}: {bad[1]}"
    return f"{decision.lines(looks)[0]}"
