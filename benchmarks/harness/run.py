"""Run every claim and write the day's result file.

    python -m benchmarks.harness.run [--size tiny] [--only stage1 generate] [--repeats N] [--profile] [--out FOLDER]

Writes `YYYY-MM-DD-DEVICE-SIZE.json` and `.md` in benchmarks/results; with `--profile`, which also tells where time
and memory of both sides go, `...-profile.json`. Claims that the day's file already
has are not run again, so a run that was stopped goes on; a claim whose peer is not installed is listed
with the reason. Exits 1 where a claim failed; a missed target is shown, and is no failure of the run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness.common import ROOT, SKIP
from blip2.io.atomic import write_json, write_text

RESULTS = ROOT / "benchmarks" / "results"
# Name of a claim -> script and arguments; by the order in which they run.
CLAIMS: dict[str, tuple[str, ...]] = {
    "stage1-step": ("stage1_step",),
    "stage1-step-bf16": ("stage1_step", "--precision", "bf16"),
    "rerank": ("rerank",),
    "rerank-bf16": ("rerank", "--precision", "bf16"),
    "stage2-step-opt": ("stage2_step", "--language", "opt-125m"),
    "stage2-step-smollm2": ("stage2_step", "--language", "smollm2-135m"),
    "generate-caption": ("generate", "--task", "caption"),
    "generate-caption-opt": ("generate", "--task", "caption", "--language", "opt-125m"),
    "generate-vqa": ("generate", "--task", "vqa"),
    "generate-questions": ("generate", "--task", "questions"),
    "generate-caption-bf16": ("generate", "--task", "caption", "--precision", "bf16"),
    "generate-questions-bf16": ("generate", "--task", "questions", "--precision", "bf16"),
    "folder": ("folder",),
    "startup": ("startup",),
    "encoder": ("encoder",),
    "encoder-bf16": ("encoder", "--precision", "bf16"),
    "encoder-compiled": ("encoder", "--ours", "compiled"),
    "encoder-compiled-bf16": ("encoder", "--ours", "compiled", "--precision", "bf16"),
    "feature-cache": ("encoder", "--what", "cache"),
    "data-1024": ("data", "--pixels", "1024x768"),
    "data-640": ("data", "--pixels", "640x480"),
    "project-once": ("project_once",),
    "traffic": ("traffic",),
    "growth": ("growth",),
}
_PACKAGES = ("torch", "transformers", "numpy", "pillow")


def main() -> int:
    """Run what the day's file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("paper", "tiny"), default="paper")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of claims to run")
    parser.add_argument("--repeats", type=int, help="pairs of every claim; each script has its own default")
    parser.add_argument("--profile", action="store_true", help="where time and memory of both sides go (CPU)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    facts = machine()
    more = "-profile" if options.profile else ""
    path = options.out / f"{datetime.now(UTC):%Y-%m-%d}-{facts['kind']}-{options.size}{more}.json"
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"machine": facts, "claims": {}}
    failed = False
    for name, command in CLAIMS.items():
        wanted = not options.only or any(part in name for part in options.only)
        if not wanted or "ratio" in results["claims"].get(name, {}) or "points" in results["claims"].get(name, {}):
            continue
        if "bf16" in command and slow_bf16(facts):
            record = {"skipped": "this CPU has no bf16 instructions (avx512_bf16, amx_bf16)"}
        else:
            profile = ("--profile",) if options.profile else ()
            record = measured(name, (*command, *profile), options.size, options.repeats)
        failed |= "error" in record
        results["claims"][name] = record
        write(path, results, table(path.stem, results))
    print(path)
    return int(failed)


def measured(name: str, command: tuple[str, ...], size: str, repeats: int | None) -> dict[str, Any]:
    """The record of one claim, or `skipped` or `error` with the reason."""
    print(f"== {name}", file=sys.stderr, flush=True)
    more = ["--size", size, *(("--repeats", str(repeats)) if repeats else ())]
    module, *arguments = command
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.claims.{module}", *arguments, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        print(lines[-1], flush=True)
        record: dict[str, Any] = json.loads(lines[-1])
        return record
    reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    print(f"{name}: {reason[0]}", file=sys.stderr, flush=True)
    return {"skipped" if done.returncode == SKIP else "error": without_paths(reason[0])}


def slow_bf16(facts: dict[str, Any]) -> bool:
    """Whether bf16 would be emulated, several times slower than fp32: an x86 processor without its instructions."""
    features = set(facts["cpu_features"])
    return not facts["gpu"] and bool(features) and not features & {"avx512_bf16", "amx_bf16"}


def without_paths(text: str) -> str:
    """A message without this machine's paths."""
    return re.sub(r"/\S+/", ".../", text)


def machine() -> dict[str, Any]:
    """Hardware and versions: what of a machine moves the numbers, and nothing that names it."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    info = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.+)$", info, re.M)
    flags = re.search(r"^flags\s*: (.+)$", info, re.M)
    features = sorted(
        {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"} & set((flags[1] if flags else "").split())
    )
    return {
        "kind": "gpu" if gpu else f"{os.cpu_count()}-cores",
        "gpu": gpu,
        "cpu": model[1] if model else platform.machine(),
        "cpu_features": features,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


# -- the result file ------------------------------------------------------------------------------


def write(path: Path, results: dict[str, Any], page: str) -> None:
    """JSON and the page made from it, each replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    write_text(path.with_suffix(".md"), page)


def table(title: str, results: dict[str, Any]) -> str:
    """The result file as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value not in (None, []))
    lines = [
        f"# {title}",
        "",
        facts,
        "",
        "| claim | ratio | target | peak | target | ours s | peer s | peer | differ by |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    notes = []
    for name, record in results["claims"].items():
        reason = record.get("skipped") or record.get("error")
        if reason or "ratio" not in record:
            notes.append(
                f"- {name}: {('not run: ' if 'skipped' in record else '') + reason if reason else growth(record)}"
            )
            continue
        lines.append(f"| {' | '.join(cells(record))} |")
    for record in results["claims"].values():
        if "profiles" in record:
            notes += ["", *profile_table(record)]
    return "\n".join([*lines, "", *notes, ""])


def profile_table(record: dict[str, Any]) -> list[str]:
    """Where the time and memory of both sides of a claim go."""
    sides = record["profiles"]
    kinds = dict.fromkeys(kind for profile in sides.values() for kind in profile["seconds"])
    rows = {kind: [profile["seconds"].get(kind, 0) for profile in sides.values()] for kind in kinds}
    rows["seconds in all"] = [round(sum(profile["seconds"].values()), 2) for profile in sides.values()]
    for name, key in (("MB of tensors held before", "held_mb"), ("most MB of tensors added", "added_mb")):
        if all(key in profile for profile in sides.values()):
            rows[name] = [profile[key] for profile in sides.values()]
    return [
        f"**{record['claim']}**",
        "",
        f"| | {' | '.join(sides)} |",
        "|---|" + "---|" * len(sides),
        *(f"| {name} | {' | '.join(map(str, values))} |" for name, values in rows.items()),
    ]


def cells(record: dict[str, Any]) -> list[str]:
    """One row of the table."""
    target, peak = record.get("target"), record.get("peak_target")
    missed = " (missed)" if target and record["ratio"] < target else ""
    large = " (missed)" if peak and record.get("peak_ratio", 0) > peak else ""
    times = [record.get("ours_s", record.get("ours_bytes")), record.get("peer_s", record.get("peer_bytes"))]
    return [
        str(record["claim"]),
        f"{record['ratio']}{missed}",
        f"at least {target}" if target else "",
        f"{record.get('peak_ratio', '')}{large}",
        f"at most {peak}" if peak else "",
        *(str(value) + (" bytes" if "ours_bytes" in record else "") for value in times),
        str(record["peer"]),
        str(record["max_abs_diff"]),
    ]


def growth(record: dict[str, Any]) -> str:
    """The exponents of the growth plot."""
    exponents = record["exponents"].items()
    text = "; ".join(f"{axis}: time {value['s']}, memory {value['mb']}" for axis, value in exponents)
    return f"{record['claim']}, exponents: {text}; ![growth]({record['plot']})"


if __name__ == "__main__":
    sys.exit(main())
