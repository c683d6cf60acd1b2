"""Claim: from the start of the process to the first caption, and to the first hit of a search, at most five seconds.

Commands as typed, with `tiny` and warm caches; seconds are the median of several starts, the interpreter included.
The ratio is that of the target to the caption's seconds; `import blip2` must take a tenth of a second at most.

    python -m benchmarks.claims.startup [--repeats 5] [--size tiny]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.common import ROOT, BenchmarkError, parse, run_script, show
from benchmarks.sides import images

TARGETS = {"caption": 5.0, "search": 5.0, "import": 0.1}
INDEXED = {"paper": 200, "tiny": 4}


def main() -> None:
    """Measure and print one JSON line."""
    options = parse(__doc__)
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as folder:
        photos, index = Path(folder) / "photos", Path(folder) / "index"
        photos.mkdir()
        images.write(photos, 640, 480, INDEXED[options.size])
        blip2 = [sys.executable, "-m", "blip2"]
        seconds([*blip2, "index", "build", str(photos), "--out", str(index), "--model", "tiny/stage1"], threads)
        commands = {
            "caption": [*blip2, "caption", str(photos / "0.jpg"), "--model", "tiny"],
            "search": [*blip2, "search", str(index), "a dog in the grass", "--k", "1"],
            "import": [sys.executable, "-c", "import blip2"],
        }
        taken = {
            name: statistics.median(seconds(command, threads) for _ in range(options.repeats))
            for name, command in commands.items()
        }
    show(
        {
            "claim": "from process start to first caption",
            "ratio": round(TARGETS["caption"] / taken["caption"], 3),
            "target": 1.0,
            "size": f"tiny; search among {INDEXED[options.size]} images, the best 128 re-ranked",
            "ours_s": round(taken["caption"], 2),
            "peer_s": TARGETS["caption"],
            "peer": "the target",
            **{f"{name}_s": [round(taken[name], 3), target] for name, target in TARGETS.items()},
            "threads": options.threads,
            "device": "cpu",
            "max_abs_diff": None,
            "repeats": options.repeats,
        }
    )


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Seconds of a command from its start to its end."""
    began = time.perf_counter()
    done: Any = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[1:4])} ended: {done.stderr[-500:]}")
    return time.perf_counter() - began


if __name__ == "__main__":
    run_script(main)
