"""CapFilt's images a second against the number of workers, and the cost of a million images.

    python -m benchmarks.experiments.capfilt_rate --workers 1 2 [--captioner tiny] [--samples 10] [--images 32] \
        [--out FILE.json]

Runs `blip2 capfilt` with one torch thread in each worker on `--images` images for each, in four shards. A rate is that
of the shards after each worker's first, so that neither imports nor the loading of models count; what they take is told
apart (`start_s`). Cost: core-hours (a worker is a core) of a million images at that rate. Workers beyond the cores that
the process may use only share them: `cores` says how many those are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from blip2.data.shards.writer import write_shard
from blip2.data.sources import open_collection

SHARDS = 4  # of each worker


def main() -> None:
    """Measure; a JSON line per number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="flickr8k:dev", help="default: %(default)s")
    parser.add_argument("--captioner", default="tiny", help="default: %(default)s")
    parser.add_argument("--ranker", help="default: the captioner's")
    parser.add_argument("--samples", type=int, default=10, help="captions drawn per image (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=32, help="of each worker (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--engine", default="local", choices=("local", "ray"))
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    results = []
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(options, workers, Path(folder)))
        print(json.dumps(results[-1]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def measure(options: argparse.Namespace, workers: int, folder: Path) -> dict[str, Any]:
    """One run of `blip2 capfilt`."""
    size = max(options.images // SHARDS, 1)
    source, out = folder / "in", folder / "out"
    make_shards(options.data, source, size, SHARDS * workers)
    models = ["--captioner", options.captioner, *(["--ranker", options.ranker] if options.ranker else [])]
    sizes = ["--samples", str(options.samples), "--batch", str(options.batch)]
    how = ["--engine", options.engine, "--workers", str(workers), "--threads", "1", "--json"]
    command = [sys.executable, "-m", "blip2", "capfilt", str(source), str(out), *models, *sizes, *how]
    began = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ends = sorted(path.stat().st_mtime - began for path in (out / ".capfilt").glob("*.json"))
    rate = rate_of(ends, workers, size)
    return {
        "workers": workers,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "captioner": options.captioner,
        "samples": options.samples,
        "images": size * len(ends),
        "images_per_s": round(rate, 3),
        "start_s": round(ends[0] - size * workers / rate, 1),
        "core_hours_per_million": round(workers * 1e6 / rate / 3600),
    }


def rate_of(ends: list[float], workers: int, size: int) -> float:
    """Images a second of shards of `size` images that ended at these seconds, each worker's first left out."""
    return (len(ends) - workers) * size / (ends[-1] - ends[workers - 1])


def make_shards(spec: str, folder: Path, size: int, count: int) -> None:
    """So many shards of so many images, one caption each as web text has."""
    folder.mkdir()
    samples = open_collection(spec).samples
    for number in range(count):
        part = samples[number * size : (number + 1) * size]
        rows = ((one.key, one.read(), {"image_id": one.image_id, "captions": one.captions[:1]}) for one in part)
        write_shard(folder / f"{number:05d}.tar", rows)


if __name__ == "__main__":
    main()
