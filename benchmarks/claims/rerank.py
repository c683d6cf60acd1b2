"""Claim: retrieval with re-ranking of the best k both ways beats LAVIS's own procedure.

Both rank all by ITC, then add ITM's score to the k best texts of each image and the k best images of
each text. LAVIS pairs each candidate anew in each direction; ours joins both directions' pairs, groups
them by image and projects it once. At paper size the work is that of one of 100 processes, as LAVIS
shares it (3 of 200 images and 3 of 200 texts), for LAVIS takes an hour and a half for all of it. Each process
embeds everything, so ITC weighs 100 times too much in that share: both sides are timed with one candidate too,
and the ratio is that of one process for all, ITC once and the rest 100 times; `ratio_share` is the share's own.

    python -m benchmarks.claims.rerank [--precision bf16] [--size tiny] [--repeats 3]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

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

# images (with a text each), k, and how many processes share the work
SHAPES = {"paper": (200, 128, 100), "tiny": (12, 5, 1)}


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(__doc__, repeats=3, precision=("fp32", "bf16"))
    bf16 = options.precision == "bf16"
    size = sized(options)
    images, k, share = SHAPES[options.size]
    lavis = Peer("benchmarks.sides.lavis:rerank", lavis_python())
    ours = Peer("benchmarks.sides.ours:rerank", settings={"weights": "bf16"} if bf16 else None)
    with tempfile.TemporaryDirectory() as folder:
        write_stage1(folder, size)
        np.savez(Path(folder) / "inputs.npz", features=features(images, size).numpy(), captions=captions(images, size))
        part = f", one of {share} processes" if share > 1 else ""
        claim = {
            "claim": "retrieval re-ranking" + (", ours in bf16" if bf16 else ""),
            "target": 10.0 if bf16 else 3.2,
            "size": f"{size}; {images} images and {images} texts, k={k} both ways{part}",
        }
        exact = not bf16 and precision_of(options) == "fp32"
        tolerance = 1e-4 if exact else 1e-1

        def measured(candidates: int, tolerance: float | None) -> dict[str, Any]:
            inputs = settings_of(options, size, folder, k=candidates, share=share)
            peers = {"LAVIS 1.0.2": lavis}
            # the check is the job itself, so that each side is warm after it
            return compare(
                claim, ours, peers, inputs, repeats=options.repeats, tolerance=tolerance, warm=tolerance is None
            )

        record = measured(k, tolerance)
        if share > 1:  # with one candidate a share of each side need not have one in common: nothing to compare
            print(json.dumps(record), file=sys.stderr, flush=True)
            record |= whole(record, measured(1, None), share)
        show(record)


def whole(share: dict[str, Any], first: dict[str, Any], processes: int) -> dict[str, Any]:
    """One process for all, from a share of it with k candidates and with one, which is ITC and next to no ITM.

    `ours_s` and `peer_s` are seconds for all of it.
    """
    seconds = {side: first[side] + processes * (share[side] - first[side]) for side in ("ours_s", "peer_s")}
    return {
        "ratio": round(seconds["peer_s"] / seconds["ours_s"], 3),
        **{side: round(value, 1) for side, value in seconds.items()},
        "ratio_share": share["ratio"],
        "share_s": [share["ours_s"], share["peer_s"]],
        "one_candidate_s": [first["ours_s"], first["peer_s"]],
    }


if __name__ == "__main__":
    run_script(main)
