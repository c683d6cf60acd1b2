"""`kill -9` at random moments of a CapFilt job and of a training run on two processes: nothing lost, nothing doubled.

Random small checkpoints through the real commands. The moments are drawn by a seed, evenly over the time that an
undisturbed run takes; what is killed is the whole tree of processes, as when a machine goes down, or one worker of it.
A job that got through before all kills were spent is compared and begun again in a new folder.

    BLIP2_KILLS=20 python -m pytest -m slow tests/smoke/test_kills.py
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2.data.shard_writer import write_shard
from blip2.weights import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("BLIP2_KILLS", "20"))
SHARDS, PICTURES, STEPS = 8, 3, 12
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "blip2")
Command = Callable[[Path], list[str]]


def test_capfilt(tiny_opt: Path, tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for shard in range(SHARDS):
        rows = [(f"k{shard}{n}", picture(PICTURES * shard + n), {"captions": ["a dog"]}) for n in range(PICTURES)]
        write_shard(source / f"s-{shard:05d}.tar", rows)

    def command(out: Path) -> list[str]:
        models = ["--captioner", str(tiny_opt), "--ranker", str(tiny)]
        sizes = ["--samples", "3", "--min-tokens", "2", "--max-tokens", "8", "--batch", "2", "--dtype", "fp32"]
        return ["-m", "blip2", "capfilt", str(source), str(out), *models, *sizes, "--threads", "1", "--workers", "2"]

    def result(out: Path) -> dict[str, object]:
        assert not list(out.glob(".*.tmp-*"))
        return {path.name: path.read_bytes() for path in sorted([*out.glob("*.tar"), out / "manifest.json"])}

    expected, kills = survive(command, result, tmp_path, seed=1)
    assert len(expected) == SHARDS + 1
    assert json.loads(expected["manifest.json"])["samples"] == SHARDS * PICTURES  # type: ignore[arg-type]
    assert kills == KILLS


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

    _, kills = survive(command, result, tmp_path, seed=2)
    assert kills == KILLS


def survive(
    command: Command, result: Callable[[Path], dict[str, object]], folder: Path, seed: int
) -> tuple[dict[str, object], int]:
    """Run undisturbed once, then with kills until all are spent and a job is done; returns the result and the kills."""
    began = time.monotonic()
    process = start(command(folder / "undisturbed"), folder / "undisturbed.log")
    assert process.wait() == 0, (folder / "undisturbed.log").read_text()[-3000:]
    duration, expected = time.monotonic() - began, result(folder / "undisturbed")
    rng, kills, jobs = random.Random(seed), 0, 0
    killed_in_job = 0
    while kills < KILLS or killed_in_job:
        out, log = folder / f"killed-{jobs}", folder / f"killed-{jobs}.log"
        process = start(command(out), log)
        hit = False
        if kills < KILLS:
            hit = kill(process, rng.uniform(0, duration), rng)
        kills += hit
        killed_in_job += hit
        code = process.wait()
        if code == 0:
            assert result(out) == expected, f"{out} differs after {killed_in_job} kills"
            print(f"{out.name}: equal after {killed_in_job} kills", file=sys.stderr)
            jobs, killed_in_job = jobs + 1, 0
        else:
            assert hit, log.read_text()[-3000:]
    return expected, kills


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as handle:
        return subprocess.Popen([sys.executable, *arguments], stdout=handle, stderr=handle, env=environment)


def kill(process: subprocess.Popen[bytes], after: float, rng: random.Random) -> bool:
    """Kill the whole tree, or one worker of it, so many seconds after its start; False where it was done before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after)
        return False
    tree = descendants(process.pid)
    if tree and rng.random() < 0.5:
        end([rng.choice(tree)])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        return True
    os.kill(process.pid, signal.SIGSTOP)  # so that it starts no more while the rest is killed
    end([*descendants(process.pid), process.pid])
    return True


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
