"""Claim: captions and answers by beam search come faster than from transformers' `generate`, with the same ids.

Beam 5 at batch 16: captions of 8 to 30 tokens, answers of 1 to 10 to one question per image, or to five. With
`--precision bf16` both sides hold all weights in bf16, where one rounding may change a word: ids are not compared.

    python -m benchmarks.claims.generate [--task vqa|questions] [--language opt-125m] [--precision bf16] [--size tiny]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness.common import Peer, captions, compare, features, parse, run_script, settings_of, show, sized
from benchmarks.sides.language import text_config, write_stage2

CLAIMS = {
    "caption": ("beam-5 captions", 2.0, 0),
    "vqa": ("beam-5 answers, one question per image", 2.0, 1),
    "questions": ("beam-5 answers, five questions per image", 3.3, 5),
}


def main() -> None:
    """Measure and print one JSON line."""
    languages = ("smollm2-135m", "opt-125m")
    options = parse(__doc__, repeats=3, task=tuple(CLAIMS), language=languages, precision=("fp32", "bf16"))
    bf16 = options.precision == "bf16"
    name, target, per_image = CLAIMS[options.task]
    size = sized(options)
    shape = options.language if options.size == "paper" else f"tiny-{options.language}"
    words = text_config(shape).vocab_size - 1
    with tempfile.TemporaryDirectory() as folder:
        write_stage2(folder, size, shape)
        np.savez(Path(folder) / "inputs.npz", features=features(size.batch, size).numpy(), captions=["1"] * size.batch)
        questions = captions(per_image * size.batch, sized(options, words=words, mean_text=9)) if per_image else []
        claim = {
            "claim": f"{name}, {options.language}" + (", both in bf16" if bf16 else ""),
            "target": target,
            "size": f"{size}, language model shaped as {shape}",
        }
        weights = {"weights": "bf16"} if bf16 else {}
        settings = settings_of(options, size, folder, shape=shape, questions=questions, **weights)
        peers = {"transformers generate": Peer("benchmarks.sides.language:generate_transformers")}
        ours = Peer("benchmarks.sides.language:generate_ours")
        show(compare(claim, ours, peers, settings, repeats=options.repeats, tolerance=None if bf16 else 0.0))


if __name__ == "__main__":
    run_script(main)
