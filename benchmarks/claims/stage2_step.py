"""Claim: our stage-2 training step beats transformers' `Blip2ForConditionalGeneration`.

The language model has the shape of OPT-125m or SmolLM2-135M and is frozen; the check compares the loss
and gradients of the trained weights.

    python -m benchmarks.claims.stage2_step [--language smollm2-135m] [--size tiny] [--repeats 5]
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
    parse,
    precision_of,
    run_script,
    settings_of,
    show,
    sized,
)
from benchmarks.sides.language import text_config, write_stage2


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(__doc__, language=("opt-125m", "smollm2-135m"))
    size = sized(options)
    shape = options.language if options.size == "paper" else f"tiny-{options.language}"
    words = text_config(shape).vocab_size - 1  # the last one marks an image for transformers
    with tempfile.TemporaryDirectory() as folder:
        write_stage2(folder, size, shape)
        texts = captions(size.batch, sized(options, words=words))
        np.savez(Path(folder) / "inputs.npz", features=features(size.batch, size).numpy(), captions=texts)
        claim = {
            "claim": f"stage-2 training step, {options.language}",
            "target": 1.4,
            "peak_target": 0.7,
            "size": f"{size}, captions of {size.mean_text} tokens on average, language model shaped as {shape}",
        }
        settings = settings_of(options, size, folder, shape=shape)
        peers = {"transformers": Peer("benchmarks.sides.language:step_transformers")}
        tolerance = 1e-3 if precision_of(options) == "fp32" else 5e-2
        ours = Peer("benchmarks.sides.language:step_ours")
        show(compare(claim, ours, peers, settings, repeats=options.repeats, tolerance=tolerance))


if __name__ == "__main__":
    run_script(main)
