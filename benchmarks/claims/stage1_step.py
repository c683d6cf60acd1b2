"""Claim: our stage-1 training step (ITC + ITM + ITG, backward, AdamW) beats LAVIS's.

Captions of natural length, which LAVIS pads to 32 tokens. The check gives both the same negatives and
compares the three losses and gradients of every kind of weight. With `--precision bf16` ours runs under
bf16 autocast, LAVIS in float32, and the losses are compared.

    python -m benchmarks.claims.stage1_step [--precision bf16] [--size tiny] [--repeats 5]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness.common import (
    Peer,
    captions,
    compare,
    features,
    lavis_python,
    parse,
    precision_of,
    run_script,
    settings_of,
    show,
    sized,
)
from benchmarks.sides.models import write_stage1


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(__doc__, precision=("fp32", "bf16"))
    bf16 = options.precision == "bf16"
    size = sized(options)
    lavis = Peer("benchmarks.sides.lavis:stage1_step", lavis_python())
    ours = Peer("benchmarks.sides.ours:stage1_step", settings={"precision": "bf16"} if bf16 else None)
    with tempfile.TemporaryDirectory() as folder:
        write_stage1(folder, size)
        texts = captions(size.batch, size)
        np.savez(Path(folder) / "inputs.npz", features=features(size.batch, size).numpy(), captions=texts)
        exact = not bf16 and precision_of(options) == "fp32"
        claim = {
            "claim": "stage-1 training step" + (", ours in bf16 autocast" if bf16 else ""),
            "target": 3.5 if bf16 else 2.0,
            "peak_target": 0.6,
            "size": f"{size}, captions of {size.mean_text} tokens on average, no dropout on either side",
        }
        settings = settings_of(options, size, folder, gradients=exact)
        show(
            compare(
                claim,
                ours,
                {"LAVIS 1.0.2": lavis},
                settings,
                repeats=options.repeats,
                tolerance=1e-3 if exact else 3e-2,
            )
        )


if __name__ == "__main__":
    run_script(main)
