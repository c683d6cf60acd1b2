"""`kill -9` at random moments of a CapFilt job and of a training run on two processes: nothing lost, nothing doubled.

Random small checkpoints through the real commands. Most of a life is spent on imports, so moments are not drawn over
wall time: a share of the kills comes while a process starts, the others are drawn evenly over the work itself, whose
beginning is seen in what it writes. What is killed is the whole tree of processes, as when a machine goes down, or one
process of it. Each job is killed several times until it gets through, then compared with one that was never disturbed.

    BLIP2_KILLS=20 python -m pytest -m slow -s tests/smoke/test_kills.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2.data.shards.writer import write_shard
from blip2.weights import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("BLIP2_KILLS", "20"))
PER_JOB = 7  # kills of one job: a job that gets through costs a whole start without a kill
STARTING = 0.2  # share of the kills that hit a process before its work begins
HANGS = 300  # seconds after which a job that was killed must have ended or gone on
SHARDS, PICTURES, STEPS = 24, 4, 24
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "blip2")


@dataclass
class Case:
    """A job that is killed.

    Args:
        command: arguments of Python for an output folder.
        work: something of a folder that differs once a process has begun to work in it.
        done: how much of the work is whole.
        result: what must come out.
    """

    command: Callable[[Path], list[str]]
    work: Callable[[Path], object]
    done: Callable[[Path], int]
    result: Callable[[Path], dict[str, object]]


@dataclass
class Killer:
    """Kills by a seed, and remembers what it hit."""

    case: Case
    rng: random.Random
    hits: list[tuple[str, str, int]] = field(default_factory=list)  # when, what, and how much was whole

    def survive(self, folder: Path) -> dict[str, object]:
        """Run undisturbed once, then with kills until all are spent; every job's result must be the same."""
        out = folder / "undisturbed"
        began, process = time.monotonic(), start(self.case.command(out), folder / "undisturbed.log")
        assert awaited(process, lambda: self.case.work(out), None), (folder / "undisturbed.log").read_text()[-3000:]
        starting = time.monotonic() - began
        assert process.wait(HANGS) == 0, (folder / "undisturbed.log").read_text()[-3000:]
        working = time.monotonic() - began - starting
        print(f"undisturbed: {starting:.1f} s to the first work, {working:.1f} s of it", file=sys.stderr)
        expected, jobs = self.case.result(out), 0
        while len(self.hits) < KILLS:
            out, before = folder / f"killed-{jobs}", len(self.hits)
            self.job(out, min(PER_JOB, KILLS - before), starting, working)
            assert self.case.result(out) == expected, f"{out} differs after {self.hits[before:]}"
            told = ", ".join(f"{what} {when} at {whole}" for when, what, whole in self.hits[before:])
            print(f"{out.name}: equal after {len(self.hits) - before} kills ({told})", file=sys.stderr)
            jobs += 1
        kinds = Counter(hit[:2] for hit in self.hits)
        print(f"{len(self.hits)} kills: " + ", ".join(f"{n} {w} {t}" for (t, w), n in kinds.items()), file=sys.stderr)
        return expected

    def job(self, out: Path, count: int, starting: float, working: float) -> None:
        """One job, killed as often (or less, where it was done before), and started again until it is through."""
        early = [self.rng.random() < STARTING for _ in range(count)]
        points = sorted(self.rng.uniform(0, working) for _ in range(early.count(False)))
        gaps = [b - a for a, b in pairwise([0.0, *points])]
        log = out.with_suffix(".log")
        code = 1
        while code != 0:
            before, killed = self.case.work(out), 0
            process = start(self.case.command(out), log)
            while early and self.wait(process, out, before, starting, gaps[0] if not early[0] else None):
                before = self.case.work(out)
                if not early.pop(0):
                    gaps.pop(0)
                killed += 1
                if self.hits[-1][1] == "all":
                    break
            code = self.ended(process, log)
            assert code == 0 or killed, log.read_text()[-3000:]

    def wait(
        self, process: subprocess.Popen[bytes], out: Path, before: object, starting: float, gap: float | None
    ) -> bool:
        """Kill at a moment before the work begins (no gap), or so long after that; False where it was done before."""
        if gap is not None and not awaited(process, lambda: self.case.work(out), before):
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(0, starting) if gap is None else gap)
            return False
        when = "starting" if self.case.work(out) == before else "working"
        whole = self.case.done(out)
        self.hits.append((when, self.kill(process), whole))
        return True

    def kill(self, process: subprocess.Popen[bytes]) -> str:
        """Kill the whole tree, or one process of it that another started; tells which."""
        tree = descendants(process.pid)
        if tree and self.rng.random() < 0.5:
            end([self.rng.choice(tree)])
            return "one"
        os.kill(process.pid, signal.SIGSTOP)  # so that it starts no more while the rest is killed
        end([*descendants(process.pid), process.pid])
        return "all"

    def ended(self, process: subprocess.Popen[bytes], log: Path) -> int:
        """Exit code of a job that is left alone now; one that hangs fails."""
        try:
            return process.wait(HANGS)
        except subprocess.TimeoutExpired:
            end([*descendants(process.pid), process.pid])
            raise AssertionError(f"hangs: {log.read_text()[-3000:]}") from None


def test_capfilt(tiny_opt: Path, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for shard in range(SHARDS):
        rows = [(f"k{shard}-{n}", picture(PICTURES * shard + n), {"captions": ["a dog"]}) for n in range(PICTURES)]
        write_shard(source / f"s-{shard:05d}.tar", rows)

    def command(out: Path) -> list[str]:
        models = ["--captioner", str(tiny_opt), "--ranker", str(tiny)]
        sizes = ["--samples", "3", "--min-tokens", "2", "--max-tokens", "8", "--batch", "2", "--dtype", "fp32"]
        return ["-m", "blip2", "capfilt", str(source), str(out), *models, *sizes, "--threads", "1", "--workers", "2"]

    def work(out: Path) -> object:
        """Shards, whole and begun."""
        return (
            sorted(path.name for path in out.glob("*.tar*")) + sorted(p.name for p in out.glob(".*.tar.tmp-*")) or None
        )

    def result(out: Path) -> dict[str, object]:
        assert not list(out.glob(".*.tmp-*"))
        return {path.name: path.read_bytes() for path in sorted([*out.glob("*.tar"), out / "manifest.json"])}

    case = Case(command, work, lambda out: len(list(out.glob("*.tar"))), result)
    expected = Killer(case, random.Random(1)).survive(tmp_path)
    assert len(expected) == SHARDS + 1
    assert json.loads(expected["manifest.json"])["samples"] == SHARDS * PICTURES  # type: ignore[arg-type]


def test_training_on_two_processes(tiny: Path, tiny_opt: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(16):
        (photos / f"{n:02d}.png").write_bytes(picture(n))
        (photos / f"{n:02d}.txt").write_text(f"a {('dog', 'bird')[n % 2]} on the grass\ntwo cats sleep\n")

    def command(out: Path) -> list[str]:
        towers = ["--vision.name", tiny, "--vision.image_size", "56", "--vision.pool", "1", "--qformer.init", tiny]
        towers += ["--qformer.queries", "5", "--qformer.embed_dim", "16", "--language.name", tiny_opt]
        data = ["--data", photos, "--data.dev", "null", "--data.cache_features", "false", "--data.workers", "0"]
        loop = ["--steps", STEPS, "--batch", "4", "--optim.warmup", "2", "--train.save_every", "1", "--train.keep", "2"]
        start = ["train", "tiny/stage1", "--init", tiny, "--out", out]
        return [*LAUNCHER, *map(str, [*start, *towers, *data, *loop])]

    def work(out: Path) -> object:
        """The log, which a process writes anew when its first step begins."""
        path = out / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def done(out: Path) -> int:
        found = runs.checkpoints(out)
        return found[-1][0] if found else 0

    def result(out: Path) -> dict[str, object]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        trained = [line for line in lines if line["kind"] == "train"]
        assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
        last = runs.checkpoints(out)[-1][1]
        assert last.name == f"step-{STEPS:06d}"
        names = ("loss", "itc", "itm", "itg", "grad_norm")
        files = {name: (last / name).read_bytes() for name in (runs.WEIGHTS, "optimizer.safetensors")}
        # the file's header holds the folder of the run, which is another for every run
        return {"losses": [[line[name] for name in names] for line in trained], **without_headers(files)}

    Killer(Case(command, work, done, result), random.Random(2)).survive(tmp_path)


def awaited(process: subprocess.Popen[bytes], work: Callable[[], object], before: object) -> bool:
    """Wait until work is done that was not there before; False where the process ends without, or hangs."""
    deadline = time.monotonic() + HANGS
    while process.poll() is None and time.monotonic() < deadline:
        if work() != before:
            return True
        time.sleep(0.01)
    return False


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as handle:
        return subprocess.Popen([sys.executable, *arguments], stdout=handle, stderr=handle, env=environment)


def end(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and that those started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def without_headers(files: dict[str, bytes]) -> dict[str, object]:
    """The tensors' bytes of safetensors files, and where each lies."""
    found: dict[str, object] = {}
    for name, data in files.items():
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        found[name] = (header, data[8 + length :])
    return found


def picture(number: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()
