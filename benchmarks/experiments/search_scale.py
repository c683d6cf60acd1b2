"""Search: latency and memory against collection size on synthetic vectors, and recall on Flickr8k dev.

    python benchmarks/experiments/search_scale.py synthetic 10000 100000     # images; 1000000 takes 25 GB of disk
    python benchmarks/experiments/search_scale.py flickr8k --model tiny      # recall@10 of IVF against exact search

Synthetic images have 32 query vectors of width 256 around 4,096 centres; queries are as far from them as texts are.
Every size is built in a child process and searched in another, so that its memory is its own: `own_mib` is the largest
of what was not a mapped file, `peak_mib` counts mapped pages, which the system may drop. Results are JSON lines.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip2.search.engines import Engine
from blip2.search.query import Index
from blip2.search.segments import Batch, Row
from blip2.search.store import FULL, ModelId, Store

QUERIES, WIDTH, CENTRES, DEPTH, ASKED = 32, 256, 4096, 10, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    synthetic = kinds.add_parser("synthetic")
    synthetic.add_argument("images", type=int, nargs="+")
    synthetic.add_argument("--folder", help="where the indexes are built (default: a temporary folder)")
    synthetic.add_argument("--engine", default="faiss", choices=("faiss", "exact"))
    flickr = kinds.add_parser("flickr8k")
    flickr.add_argument("--model", required=True)
    flickr.add_argument("--index", help="kept and reused (default: beside the model, flickr8k-dev.index)")
    for step in ("_build", "_search"):
        command = kinds.add_parser(step)
        command.add_argument("images", type=int)
        command.add_argument("folder")
        command.add_argument("engine")
    options = parser.parse_args()
    threading.Thread(target=watch_memory, daemon=True).start()
    if options.kind == "flickr8k":
        flickr8k(options.model, options.index)
    elif options.kind == "synthetic":
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for images in options.images:
                for step in ("_build", "_search"):
                    arguments = [step, str(images), f"{folder}/{images}", options.engine]
                    subprocess.run([sys.executable, __file__, *arguments], check=True)
    elif options.kind == "_build":
        say(build(options.images, Path(options.folder), options.engine))
    else:
        say({"images": options.images} | search(Store(options.folder), synthetic_queries()))


def say(record: dict[str, Any]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    memory = {"own_mib": round(_own[0]), "peak_mib": round(peak)}
    print(json.dumps(record | memory | {"threads": torch.get_num_threads()}), flush=True)


_own = [0.0]


def watch_memory() -> None:
    """Note the largest resident memory that is no file's (Linux)."""
    status = Path("/proc/self/status")
    while status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        _own[0] = max(_own[0], int(line.split()[1]) / 2**10)
        time.sleep(0.05)


def around_centres(rows: int, seed: int, spread: float = 0.5) -> np.ndarray:
    """[rows, E] unit vectors near shared centres; the noise is uniform, an order faster to draw than normal."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((CENTRES, WIDTH), dtype=np.float32)
    vectors = centres[rng.integers(0, CENTRES, rows)]
    noise = np.frombuffer(rng.bytes(vectors.size), np.int8).reshape(vectors.shape).astype(np.float32)
    noise *= spread / 73.9  # the deviation of all int8
    vectors += noise
    vectors /= np.sqrt(np.einsum("re,re->r", vectors, vectors))[:, None]
    return vectors


def synthetic_queries() -> torch.Tensor:
    """[ASKED, E] as far from the images' vectors as texts are: a cosine of about 0.5 to the nearest."""
    return torch.from_numpy(around_centres(ASKED, seed=123_456, spread=1.5))


def build(images: int, folder: Path, engine: str) -> dict[str, Any]:
    store = Store.create(folder, ModelId("synthetic", "0", QUERIES, WIDTH), engine, None)
    start = time.perf_counter()
    with store.writing():
        for first in range(0, images, FULL):
            numbers = range(first, min(first + FULL, images))
            rows = [Row(f"{n}", f"/photos/{n}.jpg", f"{n:032x}") for n in numbers]
            vectors = around_centres(len(rows) * QUERIES, seed=first).astype(np.float16)
            vectors = vectors.reshape(len(rows), QUERIES, WIDTH)
            store.change(Batch(rows, vectors, np.empty((0, WIDTH), np.float16)))
        written = time.perf_counter()
        Engine(store).update(store, progress=False)
    return {
        "images": images,
        "step": "build",
        "write_s": round(written - start, 1),
        "engine_s": round(time.perf_counter() - written, 1),
        "segments_mib": round(size(folder / "segments")),
        "engine_mib": round(size(folder / "engine")),
    }


def size(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20


def search(store: Store, queries_NE: torch.Tensor, probes: int | None = None) -> dict[str, Any]:
    """Medians of both ways, the first search apart: it maps the files."""
    index = Index(store)
    if probes is not None:
        index.engine.notes["nprobe"] = probes
    times, exact_times, results = [], [], []
    for query_E in queries_NE:
        start = time.perf_counter()
        results.append(index.nearest(query_E[None], DEPTH)[0])
        times.append(time.perf_counter() - start)
    for query_E in queries_NE[:5]:
        start = time.perf_counter()
        index.nearest(query_E[None], DEPTH, exact=True)
        exact_times.append(time.perf_counter() - start)
        if sum(exact_times) > 30:
            break
    right = exact_of_many(store, queries_NE)
    recalls = [len(np.intersect1d(ids, best)) / DEPTH for ids, best in zip(results, right, strict=True)]
    return {
        "step": "search",
        "engine": store.manifest.engine["name"],
        "lists": store.manifest.engine.get("lists"),
        "nprobe": probes or store.manifest.engine.get("nprobe"),
        "first_ms": round(1e3 * times[0], 1),
        "ms": round(1e3 * float(np.median(times)), 1),
        "p95_ms": round(1e3 * float(np.percentile(times, 95)), 1),
        "exact_ms": round(1e3 * float(np.median(exact_times)), 1),
        f"recall@{DEPTH}": round(float(np.mean(recalls)), 4),
        "queries": len(recalls),
    }


def exact_of_many(store: Store, queries_NE: torch.Tensor) -> np.ndarray:
    """[N, DEPTH] ids of the best images, every vector read once for all queries; plain torch, no code of the index."""
    scores, ids = torch.empty(len(queries_NE), 0), torch.empty(len(queries_NE), 0, dtype=torch.int64)
    for segment in store.segments:
        for start in range(0, segment.count, 512):
            part_NQE = torch.from_numpy(np.asarray(segment.vectors[start : start + 512])).float()
            dots = (part_NQE.flatten(0, 1) @ queries_NE.T).unflatten(0, part_NQE.shape[:2]).amax(dim=1)
            numbers = torch.arange(start, start + len(dots)) + (segment.serial << 32)
            scores = torch.cat([scores, dots.T], dim=1)
            ids = torch.cat([ids, numbers.expand(len(queries_NE), -1)], dim=1)
            scores, best = scores.topk(min(DEPTH, scores.shape[1]), dim=1)
            ids = ids.gather(1, best)
    return ids.numpy()


def flickr8k(model: str, path: str | None) -> None:
    """Recall@10 of IVF against exact search: every dev caption as the query, and every eighth image."""
    from blip2.inference import load
    from blip2.search.build import Builder, list_samples
    from blip2.search.model_id import identify

    folder = Path(path) if path else Path(model).parent / "flickr8k-dev.index"
    if not folder.exists() or not Store(folder).manifest.engine.get("shards"):  # not there, or stopped
        loaded = load(model)
        if not folder.exists():
            Store.create(folder, identify(loaded, model), "faiss", "data", exact_below=500)
        Builder(Store(folder), loaded).add(list_samples(["flickr8k:dev"])[0])
    store = Store(folder)
    texts = np.concatenate([np.asarray(segment.caption_vectors) for segment in store.segments])
    chosen = np.random.default_rng(0).permutation(len(texts))[:1000]
    captions = torch.from_numpy(texts[chosen]).float()
    lists = store.manifest.engine["lists"]
    for probes in sorted({lists // 32, lists // 16, lists // 8, lists // 4, store.manifest.engine["nprobe"]}):
        if probes:
            say({"images": len(store), "queries_are": "captions"} | search(store, captions, probes))


if __name__ == "__main__":
    main()
