"""One side of a claim in a process of its own, which does what it is told on standard input.

    python -m benchmarks.harness.worker MODULE:FUNCTION SETTINGS

`FUNCTION(settings)` builds a `Side`. A command is a JSON object a line: `{"do": "check", "to": FILE}`
writes the outputs to compare as `.npz`, `{"do": "time"}` runs once and answers with its seconds,
`{"do": "forget"}` starts the peak of memory anew, `{"do": "peak"}` answers with it in MB, `{"do": "profile"}`
says where time and memory of a run go. Needs torch and numpy only, so that it also runs in the environment
of a peer.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from benchmarks.harness.profiling import profiled

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Side:
    """What is timed, and what is compared with the other side.

    Args:
        run: the timed unit; called again and again.
        check: outputs by name; called once, before anything is timed.
        scale: what the seconds of a run are divided by (images of a rate, share of a job).
    """

    run: Callable[[], object]
    check: Callable[[], Outputs]
    scale: float = 1.0


def serve(side: Side, device: str, replies: TextIO) -> None:
    """Answer commands until standard input ends."""
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "check":
            np.savez(command["to"], **side.check())
        elif command["do"] == "time":
            answer["seconds"] = seconds(side.run, device) / side.scale
        elif command["do"] == "forget":
            forget_peak(device)
        elif command["do"] == "profile":
            answer = profiled(side.run)
        else:
            answer["peak_mb"] = peak_mb(device)
        print(json.dumps(answer), file=replies, flush=True)


def seconds(run: Callable[[], object], device: str) -> float:
    """Seconds of one call; by CUDA events on a GPU."""
    if device != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def forget_peak(device: str) -> None:
    """Let the peak of memory begin at what is held now, without what building the side took."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: str) -> float:
    """Most memory held since `forget_peak`, in MB: of the GPU, or of the process without mapped files."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text("utf-8")
    kilobytes = {name: int(value) for name, value in re.findall(r"^(VmHWM|RssFile):\s+(\d+) kB", status, re.M)}
    return (kilobytes["VmHWM"] - kilobytes["RssFile"]) * 1024 / 1e6


def main() -> None:
    """Build the side that the arguments name, say that it is ready, and serve."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be read as an answer
    module, _, function = sys.argv[1].partition(":")
    settings = json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    side = getattr(importlib.import_module(module), function)(settings)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    serve(side, settings["device"], replies)


if __name__ == "__main__":
    main()
