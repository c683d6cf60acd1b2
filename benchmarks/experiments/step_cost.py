"""What one training step costs: seconds, peak memory beside `blip2 estimate`, and the floor of its counted products.

Random weights at a recipe's sizes, features as the input, captions of natural length, bf16 autocast. The floor is the
operations of all matrix products and attention of the step, forward and backward, over the rate of a large bf16
product that this device reached in the same process.

    python -m benchmarks.experiments.step_cost --run vitg-opt2.7b/stage1 --batch 128 [--compile] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.experiments.estimate_memory import Step, config_of, predicted_mb
from benchmarks.harness.worker import forget_peak, peak_mb

REPEATS = 5


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, help="a recipe")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--compile", action="store_true", help="with train.compile, after it was compiled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config = config_of(options.run, options.batch, ["train.precision=bf16"], options.device)
    config = replace(config, train=replace(config.train, compile=options.compile))
    predicted = predicted_mb(config)
    step = Step(config)
    step()  # makes gradients and the optimizer's state; compiles
    operations = 0.0
    if not options.compile:  # nothing can count inside compiled code: they are the same products
        with FlopCounterMode(display=False) as counter:
            step()
        operations = float(counter.get_total_flops())
    forget_peak(options.device)
    times = [_seconds(step, options.device) for _ in range(REPEATS)]
    seconds, measured = statistics.median(times), peak_mb(options.device) - step.before_mb
    rate = _rate(options.device)
    record = {
        "run": options.run,
        "batch": options.batch,
        "compiled": options.compile,
        "step_s": round(seconds, 4),
        "peak_mb": round(measured),
        "estimated_mb": round(predicted),
        "estimate_off": round(predicted / measured - 1, 3),
        "product_tflops": round(rate / 1e12, 2),
    }
    if operations:
        floor = operations / rate
        record |= {"step_tflop": round(operations / 1e12, 3), "floor_s": round(floor, 4)}
        record["times_floor"] = round(seconds / floor, 2)
    print(json.dumps(record), flush=True)


def _seconds(run: object, device: str) -> float:
    assert callable(run)
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _rate(device: str, side: int | None = None) -> float:
    """Operations a second of a large bf16 matrix product."""
    side = side or (8192 if device == "cuda" else 1024)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [_seconds(lambda: left @ right, device) for _ in range(5)]
    return 2 * side**3 / min(times)


if __name__ == "__main__":
    main()
