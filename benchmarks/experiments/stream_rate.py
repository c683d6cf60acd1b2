"""Samples a second and core from tar shards: indexing, reading in shuffled order, decoding, fetching over HTTP.

One process, one thread; `webdataset`'s own reader, which goes through a shard from front to back, stands beside the
shuffled reads. Seconds are CPU seconds of this process, so that a busy machine does not matter, but for fetching, where
a second process serves. Files are in the page cache: this is what a core can do, not a disk.

    python -m benchmarks.experiments.stream_rate --data flickr8k:train [--samples 2000]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
import urllib.request
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset

from blip2.data.collection import Collection
from blip2.data.images import ImageSpec
from blip2.data.loader import TrainingBatches
from blip2.data.shards.reader import read_shards
from blip2.data.sources import shard_paths
from blip2.io.remote import fetch_all

SPEC = ImageSpec(224, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
BATCH = 64


def rate(count: int, work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Samples a second of the best of three runs."""
    best = float("inf")
    for _ in range(3):
        began = clock()
        work()
        best = min(best, clock() - began)
    return count / best


def batches(collection: Collection, count: int, augment: bool) -> None:
    stream = TrainingBatches(collection, batch=BATCH, seed=0, spec=SPEC, augment=augment)
    for _ in islice(stream.steps_from(0), count // BATCH):
        pass


def shuffled(collection: Collection, count: int) -> None:
    order = torch.randperm(len(collection.samples), generator=torch.Generator().manual_seed(0))[:count]
    for n in order.tolist():
        collection.samples[n].read()


def from_front(paths: list[Path], count: int) -> None:
    """What `webdataset` gives undecoded, without a shuffle."""
    for _ in islice(webdataset.WebDataset([str(p) for p in paths], shardshuffle=False), count):
        pass


def fetched(paths: list[Path]) -> float:
    """MB a second of shards from a server of another process of this machine."""
    command = [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(paths[0].parent)]
    quiet = {"stderr": subprocess.DEVNULL, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **quiet)  # type: ignore[call-overload]
    try:
        address = server.stdout.readline().split("(")[1].split(")")[0].rstrip("/")
        urllib.request.urlopen(address).close()
        with tempfile.TemporaryDirectory() as cache:
            os.environ["BLIP2_CACHE"] = cache
            began = time.monotonic()
            copies = fetch_all([f"{address}/{path.name}" for path in paths], progress=False)
            seconds = time.monotonic() - began
            return sum(Path(copy).stat().st_size for copy in copies) / seconds / 1e6
    finally:
        server.terminate()
        server.wait()


def index_bytes(paths: list[Path]) -> float:
    """Memory of a sample in the index, which every process keeps whole."""
    tracemalloc.start()
    collection = read_shards("", paths)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held / len(collection.samples)


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="flickr8k:train", help="shards on disk (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1024, help="read at most so many (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = shard_paths(options.data)
    collection = read_shards(options.data, paths)
    count = min(options.samples, len(collection.samples)) // BATCH * BATCH
    result = {
        "data": options.data,
        "samples": len(collection.samples),
        "mean_image_kb": round(sum(s.size for s in collection.samples) / len(collection.samples) / 1e3, 2),
        "index_bytes_per_sample": index_bytes(paths),
        "indexed_per_s": rate(len(collection.samples), lambda: read_shards("", paths)),
        "read_shuffled_per_s": rate(count, lambda: shuffled(collection, count)),
        "webdataset_from_front_per_s": rate(count, lambda: from_front(paths, count)),
        "decoded_plain_per_s": rate(count, lambda: batches(collection, count, augment=False)),
        "decoded_augmented_per_s": rate(count, lambda: batches(collection, count, augment=True)),
        "fetched_http_mb_per_s": fetched(paths),
    }
    print(json.dumps({name: round(v) if isinstance(v, float) and v > 99 else v for name, v in result.items()}))


if __name__ == "__main__":
    main()
