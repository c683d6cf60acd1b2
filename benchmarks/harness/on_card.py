"""Everything that wants an accelerator, in ten minutes: `make test-gpu`.

    python -m benchmarks.harness.on_card [--device cuda] [--minutes 10] [--only tests stage1] [--out FOLDER]

Each part runs in a process of its own under a limit of its own. One that fails, or for which no time is left, is
named with its reason while the others go on. Writes `YYYY-MM-DD-DEVICE-card.json` and `.md`, anew after every part.
Without a GPU the parts run at small sizes on the CPU, which shows that they work before minutes of a card are spent.
Exits 1 where a part failed; a part that cannot run here (a peer or a library is missing) is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import run
from benchmarks.harness.common import ROOT, SKIP

# Seconds of a part at most; claims share what is left at the end.
LIMIT = 150
# Claims are shown with one repeat: that they hold on this device, not a figure to quote.
CLAIM_LIMIT = 60
# Of the two tiny stages, by device: without a card they only show that they run.
STEPS = {"cuda": 50, "cpu": 10}


@dataclass(frozen=True)
class Setup:
    """Where the parts run and how large.

    Args:
        device: `cuda` or `cpu`.
        size: `paper` on a card, `tiny` elsewhere.
        folder: for runs, gone at the end.
    """

    device: str
    size: str
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "images"


Part = Callable[[Setup, float], dict[str, Any]]


def main() -> int:
    """Run the parts and write what they gave."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10, help="for all parts (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="parts whose names contain one of these")
    parser.add_argument("--out", type=Path, default=run.RESULTS)
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    facts = run.machine()
    path = options.out / f"{datetime.now(UTC):%Y-%m-%d}-{facts['kind']}-card.json"
    results: dict[str, Any] = {"machine": facts, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(options.device, "paper" if options.device == "cuda" else "tiny", Path(folder))
        draw_images(setup.data)
        for name, part in {**PARTS, **claims()}.items():
            if options.only and not any(wanted in name for wanted in options.only):
                continue
            results["parts"][name] = record = attempt(part, setup, ends - time.monotonic())
            print(f"{name}: {one_line(record)}", flush=True)
            run.write(path, results, table(path.stem, results))
    print(path)
    return int(any("failed" in record for record in results["parts"].values()))


def attempt(part: Part, setup: Setup, left: float) -> dict[str, Any]:
    """The record of a part, with its seconds; `failed` or `not run` with the reason where there is none."""
    if left < 5:
        return {"not run": "no time was left: give it more with --minutes"}
    began = time.monotonic()
    try:
        record = part(setup, left)
    except PartError as error:
        record = {"not run" if error.skipped else "failed": str(error)}
    return {**record, "seconds": round(time.monotonic() - began, 1)}


class PartError(Exception):
    """A part gave nothing; `skipped` where it cannot run here."""

    def __init__(self, reason: str, *, skipped: bool = False) -> None:
        super().__init__(run.without_paths(reason))
        self.skipped = skipped


def call(arguments: list[str], left: float, *, limit: float = LIMIT) -> str:
    """Standard output of a Python command.

    Raises:
        PartError: it failed, or took longer than it may.
    """
    allowed = min(limit, left)
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=allowed,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])},
        )
    except subprocess.TimeoutExpired as error:
        raise PartError(f"it was not done after {allowed:.0f} s") from error
    if done.returncode:
        reason = reason_of(done.stderr.strip() or done.stdout.strip()) or f"exit status {done.returncode}"
        # what says which package to install is missing here, and did not fail
        raise PartError(reason, skipped=done.returncode == SKIP or "pip install" in reason)
    return done.stdout


def reason_of(said: str) -> str:
    """The line of a failed command's output that tells why: our own error, else Python's, else the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip(" =-")]
    ours = [line for line in lines if line.startswith("blip2: ")]
    errors = [line for line in lines if "Error: " in line]
    return (ours or errors or lines or [""])[-1]


# -- parts ----------------------------------------------------------------------------------------


def tests(setup: Setup, left: float) -> dict[str, Any]:
    """The tests marked `gpu`, and how many passed."""
    out = call(["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"], left, limit=240)
    counted = dict(re.findall(r"(\d+) (passed|skipped|deselected)", out)[::-1])
    counts = {kind: int(number) for number, kind in counted.items()}
    return {"passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0)}


def train(stage: str, *more: str, launcher: tuple[str, ...] = ("-m", "blip2"), name: str | None = None) -> Part:
    """A tiny stage for `STEPS` steps with dev evaluation, as a user types it."""

    def part(setup: Setup, left: float) -> dict[str, Any]:
        out, steps = setup.folder / (name or stage), STEPS[setup.device]
        if stage == "stage2" and not (setup.folder / "stage1" / "report.html").exists():
            raise PartError("the part stage1, which it begins from, did not end")
        start = ["--init", str(setup.folder / "stage1")] if stage == "stage2" else []
        loop = ["--steps", str(steps), "--batch", "16", "--optim.warmup", "5", "--train.eval_every", str(steps // 2)]
        read = ["--data", str(setup.data), "--data.dev", str(setup.data), "--eval.images", "32", "--eval.samples", "4"]
        given = ["train", f"tiny/{stage}", "--out", str(out), "--train.device", setup.device, *start, *loop, *read]
        call([*launcher, *given, *more], left)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        dev = [line["loss"] for line in lines if line["kind"] == "dev"]
        if not losses[-1] < losses[0]:
            raise PartError(f"the loss did not fall: {losses[0]:.3f} to {losses[-1]:.3f}")
        speed = sorted(line["pairs_per_s"] for line in lines if line["kind"] == "train")[len(losses) // 2]
        return {"loss": [losses[0], losses[-1]], "dev_loss": [dev[0], dev[-1]], "pairs_per_s": round(speed, 1)}

    return part


def step(stage: str, *more: str) -> Part:
    """One training step in bf16 with random weights: time, memory against the estimate, and the counted floor."""

    def part(setup: Setup, left: float) -> dict[str, Any]:
        sizes = {"paper": ("vitg-opt2.7b", 128), "tiny": ("tiny", 8)}
        recipe, batch = sizes[setup.size]
        given = ["--run", f"{recipe}/{stage}", "--batch", str(batch), "--device", setup.device]
        lines = call(["-m", "benchmarks.experiments.step_cost", *given, *more], left).strip().splitlines()
        record: dict[str, Any] = json.loads(lines[-1])
        return record

    return part


def quantized(kind: str) -> Part:
    """Captions by a language model in int8 or nf4."""

    def part(setup: Setup, left: float) -> dict[str, Any]:
        images = sorted(setup.data.glob("*.png"))[:4]
        given = ["caption", *map(str, images), "--model", "tiny", "--device", setup.device, "--quantize", kind]
        out = call(["-m", "blip2", *given, "--json"], left)
        captions = [json.loads(line)["captions"][0] for line in out.splitlines()]
        if len(captions) != len(images) or not all(captions):
            raise PartError(f"{len(captions)} captions of {len(images)} images: {captions}")
        return {"captions": captions}

    return part


def claim(name: str, command: tuple[str, ...]) -> Part:
    """A claim of `benchmarks/`, measured once."""

    def part(setup: Setup, left: float) -> dict[str, Any]:
        module, *arguments = command
        given = ["-m", f"benchmarks.claims.{module}", *arguments, "--size", setup.size, "--repeats", "1"]
        record: dict[str, Any] = json.loads(call(given, left, limit=CLAIM_LIMIT).strip().splitlines()[-1])
        return {key: record[key] for key in ("ratio", "target", "ours_s", "peer_s", "peak_ratio") if key in record}

    return part


def claims() -> dict[str, Part]:
    """Every claim that `make bench` measures, under its name there; the growth plot takes too long."""
    return {f"claim {name}": claim(name, command) for name, command in run.CLAIMS.items() if name != "growth"}


_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "blip2")
PARTS: dict[str, Part] = {
    "tests": tests,
    "stage1": train("stage1"),
    "stage2": train("stage2"),
    "stage1 step": step("stage1"),
    "stage2 step": step("stage2"),
    "stage1 step, compiled": step("stage1", "--compile"),
    "fsdp2 stage1": train("stage1", "--train.parallel", "fsdp2", launcher=_TORCHRUN, name="fsdp2"),
    "fsdp2 stage2": train("stage2", "--train.parallel", "fsdp2", launcher=_TORCHRUN, name="fsdp2-2"),
    "int8": quantized("int8"),
    "nf4": quantized("nf4"),
}


def draw_images(folder: Path, count: int = 64) -> None:
    """Images of plain colours with a square in another, and captions that say so."""
    folder.mkdir(parents=True)
    colors = ("red", "green", "blue", "black", "white", "yellow", "gray", "orange")
    rng = np.random.default_rng(0)
    for number in range(count):
        ground, square = colors[number % 8], colors[(number // 8 + number + 1) % 8]
        image, (x, y) = Image.new("RGB", (96, 96), ground), rng.integers(5, 50, 2)
        image.paste(Image.new("RGB", (40, 40), square), (int(x), int(y)))
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {square} square on a {ground} ground\n", "utf-8")


# -- the result -----------------------------------------------------------------------------------


def one_line(record: dict[str, Any]) -> str:
    """A record on one line."""
    for word in ("failed", "not run"):
        if word in record:
            return f"{word}: {record[word]}"
    return ", ".join(f"{name} {value}" for name, value in record.items())


def table(title: str, results: dict[str, Any]) -> str:
    """The result file as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value not in (None, []))
    lines = [f"# {title}", "", facts, "", "| part | result |", "|---|---|"]
    lines += [f"| {name} | {one_line(record).replace('|', ' ')} |" for name, record in results["parts"].items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
