"""Claim: projecting an image's keys/values once beats projecting them for every text of it.

One image is matched with k texts (re-ranking, section 6 of the design): once through one `ImageKV`
that all texts read in place, once with the image's features repeated for every pair, as LAVIS and
transformers do it. Same module, same random weights, float32; outputs must agree.

    python benchmarks/bench_project_once.py [--texts 32] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blip2.models.qformer import QFormer

TOLERANCE = 1e-4


def main() -> None:
    """Time both in turn and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=32, help="texts per image")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    qformer = QFormer().eval()  # the paper's: 12 layers, width 768, 32 queries, 257 x 1408 features
    features = torch.randn(1, 257, 1408)
    lengths = torch.randint(8, 17, (options.texts,))
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.randint(1000, 30000, mask.shape)

    def once() -> Tensor:
        return qformer.encode_pair(ids, mask, qformer.project_image(features))

    def every_time() -> Tensor:
        return qformer.encode_pair(ids, mask, qformer.project_image(features.expand(options.texts, -1, -1)))

    with torch.inference_mode():
        difference = float((once() - every_time()).abs().max())
        assert difference < TOLERANCE, f"outputs differ by {difference}"
        times = [(timed(once), timed(every_time)) for _ in range(options.repeats)]
    ours, peer = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        json.dumps(
            {
                "claim": "match one image with k texts: project once against project per pair",
                "ratio": round(peer / ours, 2),
                "ours_s": round(ours, 4),
                "peer_s": round(peer, 4),
                "peer": "the same Q-Former, features repeated per pair",
                "size": f"12 layers, 768 wide, 32 queries, 257 x 1408, k={options.texts}",
                "threads": torch.get_num_threads(),
                "max_abs_diff": difference,
            }
        )
    )


def timed(function: Callable[[], Tensor]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
