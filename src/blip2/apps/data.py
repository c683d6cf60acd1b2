"""`blip2 data check`: what is in a data set, and what in it is bad."""

from __future__ import annotations

import dataclasses
import json

from blip2.data.check import check_collection, format_report


def check_command(path: str, *, as_json: bool) -> int:
    """Print the report of a data set; exit code 0 also when it has bad samples (training skips them)."""
    report = check_collection(path, progress=not as_json)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "by_reason": report.by_reason()}))
    else:
        print(format_report(report))
    return 0
