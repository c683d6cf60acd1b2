"""Training batches from a real HTTP server and a real S3 server that fail: those from disk, in the same order.

The HTTP server drops, delays, refuses and corrupts 5% of its answers each; one shard it never gives whole, and one
it sends byte by byte for ever.
"""

from __future__ import annotations

import http.server
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2.data.batch import Batch
from blip2.data.images import ImageSpec
from blip2.data.loader import TrainingBatches
from blip2.data.shards.writer import write_shard
from blip2.data.sources import open_collection
from blip2.io import remote

SHARDS, SAMPLES = 40, 4
DEAD, SLOW = "s-00013.tar", "s-00029.tar"
SHARE = 0.05  # of the answers, for each kind of trouble
SEED = 15  # with which each kind comes twice or more
KINDS = ("refuse", "drop", "corrupt", "delay")
SPEC = ImageSpec(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, jpeg: Callable[..., bytes]) -> Path:
    """Shards and their manifest."""
    folder = tmp_path_factory.mktemp("disk")
    records = []
    for shard in range(SHARDS):
        numbers = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        rows = [(f"k{n:04d}", jpeg(n), {"captions": [f"picture {n}", f"noise {n}"]}) for n in numbers]
        name = f"s-{shard:05d}.tar"
        records.append({"file": name, **vars(write_shard(folder / name, rows))})
    (folder / "manifest.json").write_text(json.dumps({"shards": records}))
    return folder


class Failing(http.server.BaseHTTPRequestHandler):
    """Serves a folder, with ranges; what goes wrong is drawn by a seed from the shard and the number of the answer."""

    folder: Path
    requests: Counter[str]
    done: Counter[str]
    closing: threading.Event

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        number, self.requests[name] = self.requests[name], self.requests[name] + 1
        data = (self.folder / name).read_bytes()
        trouble = self.trouble(name, number)
        self.done[trouble] += 1
        if trouble == "refuse":
            self.send_error(503)
            return
        byte_range = self.headers.get("Range")
        start = int(byte_range.removeprefix("bytes=").rstrip("-")) if byte_range else 0
        body = data[start:]
        if trouble == "corrupt":
            half = len(body) // 2
            body = body[:half] + bytes(255 - byte for byte in body[half : half + 9]) + body[half + 9 :]
        if trouble == "delay":
            time.sleep(0.2)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if trouble == "trickle":
            self.trickle(body)
        else:
            self.wfile.write(body[: len(body) // 3] if trouble == "drop" else body)

    def trouble(self, name: str, number: int) -> str:
        if name == DEAD:
            return "corrupt"
        if name == SLOW:
            return "trickle"
        draw = random.Random(f"{SEED} {name} {number}").random()
        return KINDS[int(draw / SHARE)] if draw < SHARE * len(KINDS) else "none"

    def trickle(self, body: bytes) -> None:
        for byte in body:
            if self.closing.wait(0.02):
                return
            try:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            except OSError:  # the client has given up
                return

    def log_message(self, *parts: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(disk: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Address of the failing server, and how often it did what."""
    done: Counter[str] = Counter()
    closing = threading.Event()
    own = {"folder": disk, "requests": Counter(), "done": done, "closing": closing}
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Failing,), own))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/set", done
    closing.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of each test's own, and a patience of milliseconds."""
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)


def batches(spec: str, steps: int, **options: Any) -> list[Batch]:
    stream = TrainingBatches(open_collection(spec), batch=8, seed=3, spec=SPEC, augment=True, **options)
    return list(islice(stream.steps_from(0), steps))


def require_same(actual: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one.keys, one.captions) == (other.keys, other.captions)
        assert one.pixels is not None
        assert other.pixels is not None
        assert torch.equal(one.pixels, other.pixels)


def test_failing_http_server(server: tuple[str, Counter[str]], disk: Path) -> None:
    address, done = server
    spec = f"{address}/s-{{00000..{SHARDS - 1:05d}}}.tar"
    collection = open_collection(spec)
    assert {bad.path: bad.reason for bad in collection.bad} == {
        f"{address}/{DEAD}": "shard cannot be fetched in 6 attempts (checksum differs from the manifest's)",
        f"{address}/{SLOW}": "shard cannot be fetched in 6 attempts (less than 4096 bytes a second)",
    }
    assert all(done[kind] > 0 for kind in KINDS), done
    intact = [disk / f"s-{n:05d}.tar" for n in range(SHARDS) if f"s-{n:05d}.tar" not in (DEAD, SLOW)]
    for path in intact:
        assert remote.cached(f"{address}/{path.name}").read_bytes() == path.read_bytes()
    left = disk / f"s-{{{','.join(p.stem.removeprefix('s-') for p in intact)}}}.tar"
    require_same(batches(spec, 25), batches(str(left), 25))


def test_nothing_is_lost_of_shards_that_can_be_had(disk: Path, server: tuple[str, Counter[str]]) -> None:
    """Whatever fails on the way: the two hopeless shards left out, every sample comes."""
    names = ",".join(f"{n:05d}" for n in range(SHARDS) if f"s-{n:05d}.tar" not in (DEAD, SLOW))
    collection = open_collection(f"{server[0]}/s-{{{names}}}.tar")
    assert collection.bad == []
    assert len(collection.samples) == (SHARDS - 2) * SAMPLES


def test_run_ends_and_its_report_names_every_lost_shard(
    server: tuple[str, Counter[str]], tiny: Path, tmp_path: Path
) -> None:
    from blip2.cli.main import main

    address, _ = server
    out = tmp_path / "run"
    towers = ["--vision.name", tiny, "--vision.image_size", "56", "--vision.pool", "1", "--qformer.init", tiny]
    sizes = ["--qformer.queries", "5", "--qformer.embed_dim", "16", "--data.cache_features", "false"]
    loop = ["--steps", "3", "--batch", "4", "--optim.warmup", "1", "--data.workers", "0", "--data.dev", "null"]
    data = ["--data", f"{address}/s-{{00000..{SHARDS - 1:05d}}}.tar", "--out", out]
    assert main(["train", "tiny/stage1", *map(str, ["--init", tiny, *data, *towers, *sizes, *loop])]) == 0
    lost = json.loads((out / "summary.json").read_text())["lost_shards"]
    assert set(lost) == {f"{address}/{DEAD}", f"{address}/{SLOW}"}
    report = (out / "report.html").read_text()
    assert all(shard in report and reason.split(" (")[0] in report for shard, reason in lost.items())


# -- S3 --------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """moto's S3 server in a process of its own, with the shards but one in it; gives the file system."""
    for name, package in (("s3fs", "blip2[s3]"), ("moto", "'moto[s3]'"), ("flask", "flask flask-cors")):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install {package}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": ""})
    address = f"http://127.0.0.1:{port}"
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", address),
    ):
        monkeypatch.setenv(name, value)
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"{address}/moto-api/"):
            assert process.poll() is None, "moto's server ended"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.1)
        import s3fs

        system = s3fs.S3FileSystem()
        system.mkdir("shards")
        for path in [*sorted(disk.glob("*.tar"))[:8], disk / "manifest.json"]:
            if path.name != "s-00005.tar":
                system.put_file(str(path), f"shards/{path.name}")
        yield system
    finally:
        process.terminate()
        process.wait()


def test_s3(bucket: Any, disk: Path) -> None:
    """The batches of the disk; a shard that is missing and one that is damaged are named, nothing else is lost."""
    shard = (disk / "s-00002.tar").read_bytes()
    bucket.pipe_file("shards/s-00002.tar", shard[:700] + bytes(255 - byte for byte in shard[700:708]) + shard[708:])
    spec = "s3://shards/s-{00000..00007}.tar"
    collection = open_collection(spec)
    assert {bad.path: bad.reason for bad in collection.bad} == {
        "s3://shards/s-00005.tar": "shard is not there",
        "s3://shards/s-00002.tar": "shard cannot be fetched in 6 attempts (checksum differs from the manifest's)",
    }
    left = disk / "s-{00000,00001,00003,00004,00006,00007}.tar"
    require_same(batches(spec, 6), batches(str(left), 6))


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status < 500
    except OSError:
        return False
