"""Claim: global hard negatives cost a fraction of the bytes that LAVIS's gather of all features sends.

Two gloo processes run one stage-1 step (forward and backward) with the same negatives; collectives are
wrapped and their bytes counted, without the gradient exchange of the weights, which both have alike.
The losses must be equal. The depth does not matter for the traffic and is 2.

    python -m benchmarks.claims.traffic [--size tiny]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.common import (
    ROOT,
    BenchmarkError,
    captions,
    features,
    lavis_python,
    parse,
    run_script,
    settings_of,
    show,
    sized,
)
from benchmarks.sides.models import write_stage1

WORLD, TOLERANCE = 2, 1e-4


def main() -> None:
    """Count and print one JSON line."""
    options = parse(__doc__, repeats=1)
    options.device = "cpu"
    python = lavis_python()
    size = sized(options, depth=2)
    with tempfile.TemporaryDirectory() as folder:
        write_stage1(folder, size)
        texts = captions(size.batch, size) * WORLD  # as many tokens in every process: LAVIS averages means
        np.savez(Path(folder) / "inputs.npz", features=features(WORLD * size.batch, size).numpy(), captions=texts)
        settings = settings_of(options, size, folder, world=WORLD)
        mine, theirs = counted("ours", sys.executable, settings), counted("lavis", python, settings)
    gap = max(abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))
    if gap > TOLERANCE * max(theirs["losses"]):
        raise BenchmarkError(f"losses differ by {gap:.3g}: ours {mine['losses']}, LAVIS {theirs['losses']}")
    show(
        {
            "claim": "bytes sent per process and stage-1 step",
            "target": None,
            "ratio": float(f"{theirs['bytes'] / mine['bytes']:.4g}"),
            "ours_bytes": round(mine["bytes"]),
            "peer_bytes": round(theirs["bytes"]),
            "peer": "LAVIS 1.0.2",
            "size": f"{size} in each of {WORLD} processes",
            "threads": options.threads,
            "max_abs_diff": float(f"{gap:.3g}"),
            "ours_of_rank_0": mine["of_rank_0"],
            "peer_of_rank_0": theirs["of_rank_0"],
        }
    )


def counted(kind: str, python: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What `benchmarks.sides.traffic` counts in `WORLD` processes."""
    environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])}
    command = [python, "-m", "benchmarks.sides.traffic", kind]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, str(rank), json.dumps(settings)], cwd=ROOT, env=environment, **pipes)
        for rank in range(WORLD)
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise BenchmarkError(f"{kind}: {errors[-2000:]}")
    counts: dict[str, Any] = json.loads(outputs[0][0])
    return counts


if __name__ == "__main__":
    run_script(main)
