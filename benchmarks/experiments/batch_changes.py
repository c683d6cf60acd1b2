"""How many captions and answers depend on what else is in the batch: 1, 3 or 16 images at a time.

Kernels add up a row's products in an order that depends on how many rows there are. In float32 that moves a logit by
1e-5, in bf16 by tenths, and where two words are nearly as likely the other one is written. `default` is what
`blip2.load` takes by itself.

    python -m benchmarks.experiments.batch_changes [--model tiny] [--data flickr8k:dev] [--images 200] \
        [--dtype bf16] [--beams 1]
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import combinations
from typing import Any

import torch

import blip2
from blip2.data.sources import open_collection

BATCHES = (1, 3, 16)
QUESTION = "What is in the picture?"


def main() -> None:
    """Print one JSON line a precision."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="flickr8k:dev")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--dtype", choices=("default", "fp32", "bf16"), nargs="*", default=["default", "fp32", "bf16"])
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = [sample.read() for sample in open_collection(options.data).limited(options.images).samples]
    for dtype in options.dtype:
        model = blip2.load(options.model, dtype=None if dtype == "default" else dtype, device=options.device)
        outputs: dict[int, tuple[list[str], list[str]]] = {}
        seconds = {}
        for batch in BATCHES:
            model.batch, began = batch, time.perf_counter()
            captions = model.caption(images, beams=options.beams)
            outputs[batch] = captions, model.ask(images, QUESTION, beams=options.beams)
            seconds[batch] = round(time.perf_counter() - began, 1)
        record: dict[str, Any] = {"dtype": dtype, "beams": options.beams, "images": len(images), "seconds": seconds}
        for name, part in (("captions", 0), ("answers", 1)):
            record[name] = {
                f"{a} or {b}": sum(x != y for x, y in zip(outputs[a][part], outputs[b][part], strict=True))
                for a, b in combinations(BATCHES, 2)
            }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
