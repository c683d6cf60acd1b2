"""Faults under a server with an index: killed writers, full disks, another index or file in its place, bad pictures.

It keeps answering: from the index where that is whole, else with what is wrong and what to do.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from blip2.cli.main import main
from blip2.inference import Blip2
from blip2.search.build import Builder, list_samples
from blip2.search.model_id import identify
from blip2.search.query import Index
from blip2.search.store import Store

TEXT = "a dog on the grass"
# Writes every two images, so that there is much to be killed in the middle of.
ADDING = """
import sys
import blip2
from blip2.search import build
from blip2.search.store import Store
build._SEGMENT = 2
model = blip2.load(sys.argv[1], device="cpu")
model.batch = 1
print("ready", flush=True)
build.Builder(Store(sys.argv[2]), model, progress=False).add(build.list_samples([sys.argv[3]]).samples)
"""


def more(photos: Path, count: int) -> None:
    rng = np.random.default_rng(1)
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(photos / f"q{n:03d}.png")


def built(model: Blip2, photos: Path, path: Path) -> Store:
    store = Store.create(path, identify(model, str(model.home)), "exact", "data")
    Builder(store, model, progress=False).add(list_samples([str(photos)]).samples)
    return store


def search(address: str, k: int = 200) -> dict[str, float]:
    """Names and scores of all that a search finds."""
    answer = httpx.post(f"{address}/search", json={"text": TEXT, "k": k}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["images"] == len(answer.json()["hits"])
    return {hit["name"]: hit["score"] for hit in answer.json()["hits"]}


def truth(model: Blip2, photos: Path) -> dict[str, float]:
    paths = sorted(photos.rglob("*.png"))
    return {p.name: float(s) for p, s in zip(paths, model.similarity(list(map(str, paths)), TEXT)[:, 0], strict=True)}


def assert_same(scores: dict[str, float], expected: dict[str, float]) -> None:
    assert scores.keys() == expected.keys()
    # bf16, where it is the default: an image alone and in a batch differ by some thousandths
    np.testing.assert_allclose([scores[name] for name in expected], list(expected.values()), atol=1e-2)


def test_kill_9_while_a_served_index_is_added_to(
    stage1_only: Blip2, tiny: Path, photos: Path, tmp_path: Path, listening: Any
) -> None:
    path = tmp_path / "i"
    first = truth(stage1_only, photos)
    store = built(stage1_only, photos, path)
    more(photos, 120)
    with listening(stage1_only, index=Index(store, stage1_only)) as (address, _, _):
        assert_same(search(address), first)
        command = [sys.executable, "-c", ADDING, str(tiny), str(path), str(photos)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            seen, start = 12, time.monotonic()
            while seen < 20 and child.poll() is None and time.monotonic() - start < 100:
                now = len(search(address))  # every answer on the way is whole
                assert now >= seen
                seen = now
            child.send_signal(signal.SIGKILL)
        assert 20 <= seen < 132
        left = search(address)
        assert len(left) == len(Store(path))
        expected = truth(stage1_only, photos)
        assert_same(left, {name: expected[name] for name in left})
        assert main(["index", "add", str(path), str(photos), "--model", str(tiny)]) == 0
        assert_same(search(address), expected)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here: not root, or a container without the right")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_under_a_served_index(
    stage1_only: Blip2, tiny: Path, photos: Path, tmp_path: Path, listening: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = truth(stage1_only, photos)
    with small_disk(tmp_path / "disk") as disk:
        store = built(stage1_only, photos, disk / "i")
        before = (disk / "i" / "manifest.json").read_bytes()
        more(photos, 40)
        with listening(stage1_only, index=Index(store, stage1_only)) as (address, _, _):
            ballast = disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as handle:
                while handle.write(b"x" * 4096):
                    pass
            capsys.readouterr()
            assert main(["index", "add", str(disk / "i"), str(photos), "--model", str(tiny)]) == 2
            said = capsys.readouterr().err.splitlines()[-1]
            assert "No space left on device" in said
            assert "what was there before is whole" in said
            assert (disk / "i" / "manifest.json").read_bytes() == before
            assert_same(search(address), first)
            ballast.unlink()
            assert main(["index", "add", str(disk / "i"), str(photos), "--model", str(tiny)]) == 0
            assert_same(search(address), truth(stage1_only, photos))


@pytest.mark.slow
def test_a_write_that_the_system_cuts_short(
    stage1_only: Blip2, tiny: Path, photos: Path, tmp_path: Path, listening: Any
) -> None:
    """As a full disk, but needs no root: no file of the writer may be longer than 2 KiB."""
    store = built(stage1_only, photos, tmp_path / "i")
    first = truth(stage1_only, photos)
    more(photos, 40)
    with listening(stage1_only, index=Index(store, stage1_only)) as (address, _, _):
        adding = ["index", "add", str(tmp_path / "i"), str(photos), "--model", str(tiny)]
        limited = subprocess.run(
            [sys.executable, "-m", "blip2", *adding],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
        )
        assert limited.returncode == 2, limited.stderr
        said = limited.stderr.splitlines()[-1]
        assert "index cannot be written: File too large; what was there before is whole" in said
        assert_same(search(address), first)
        assert main(adding) == 0
        assert_same(search(address), truth(stage1_only, photos))


def refused(address: str, code: str) -> str:
    """What a search is told that cannot be answered."""
    answer = httpx.post(f"{address}/search", json={"text": TEXT}, timeout=60)
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", code)
    return str(error["message"])


def test_another_index_or_none_in_its_place(
    stage1_only: Blip2, photos: Path, tmp_path: Path, listening: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "i"
    store = built(stage1_only, photos, path)
    with listening(stage1_only, index=Index(store, stage1_only)) as (address, _, _):
        first = search(address)
        manifest = path / "manifest.json"
        good = manifest.read_text()
        manifest.write_text(good[: len(good) // 2])
        said = [refused(address, "index_damaged")]
        other = json.loads(good)
        other["model"]["fingerprint"] = "0" * 16
        manifest.write_text(json.dumps(other))
        said.append(refused(address, "index_of_another_model"))
        assert "start the server again with that model" in said[-1]
        assert "rebuilt with" in caplog.text
        path.rename(tmp_path / "away")
        said.append(refused(address, "index_damaged"))
        assert "build it again" in said[-1]
        assert "no index here" in caplog.text
        assert not any(str(tmp_path) in line for line in said)
        assert httpx.get(f"{address}/healthz").status_code == 200
        embedded = httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": TEXT}, timeout=60)
        assert embedded.status_code == 200  # what needs no index is answered
        (tmp_path / "away").rename(path)
        manifest.write_text(good)
        assert search(address) == first  # put back, it is searched again


@pytest.mark.parametrize("name", ["vectors.f16", "captions.f16", "rows.jsonl"])
def test_a_file_of_the_index_replaced_under_it(
    stage1_only: Blip2,
    tiny: Path,
    photos: Path,
    tmp_path: Path,
    listening: Any,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cut in place (reading such a mapping would end the process), of another index, and gone."""
    path = tmp_path / "i"
    store = built(stage1_only, photos, path)
    file = path / "segments" / f"{store.segments[0].serial:06d}" / name
    good = file.read_bytes()

    def cut() -> None:
        with file.open("r+b") as handle:
            handle.truncate(5)

    with listening(stage1_only, index=Index(store, stage1_only)) as (address, _, _):
        first = search(address)
        for fault in (cut, lambda: file.write_bytes(good[::-1]), file.unlink):
            fault()
            assert "build it again" in refused(address, "index_damaged")
            for command in (["search", str(path), TEXT], ["index", "add", str(path), str(photos)]):
                capsys.readouterr()
                assert main([*command, "--model", str(tiny)]) == 2
                err = capsys.readouterr().err
                assert err.count("\n") == 1
                assert f"{file.parent}: segment is damaged" in err
                assert "put the file back" in err
            file.write_bytes(good)
            assert search(address) == first


def test_an_index_of_another_model_is_not_served(
    stage1_only: Blip2, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(identify(stage1_only, "runs/other"), fingerprint="0" * 16)
    Store.create(tmp_path / "i", other, "exact", None)
    assert main(["serve", "--model", str(tiny), "--index", str(tmp_path / "i"), "--port", "0"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"built with {other}, not with" in said
    assert "give --model runs/other" in said


def test_mutated_photographs_over_http(
    stage1_only: Blip2, flickr8k: Path, photos: Path, tmp_path: Path, listening: Any, mutations: Any
) -> None:
    """200 damaged photographs by every way in: each is used or refused as the client's mistake."""
    with tarfile.open(min(flickr8k.glob("dev-*.tar"))) as shard:
        pictures = [shard.extractfile(m).read() for m in shard.getmembers() if m.name.endswith(".jpg")][:50]  # type: ignore[union-attr]
    store = built(stage1_only, photos, tmp_path / "i")
    ways = [
        ("caption", {"max_tokens": "2", "beams": "1"}),
        ("attend", {}),
        ("search", {"k": "2"}),
        ("v1/embeddings", {}),
    ]
    statuses: Counter[int] = Counter()
    with listening(stage1_only, index=Index(store, stage1_only)) as (address, _, _), httpx.Client(timeout=60) as client:
        first = search(address)
        for seed, picture in enumerate(pictures):
            for data, turn in zip(mutations(picture, seed), range(4), strict=True):
                way, fields = ways[(seed + turn) % len(ways)]
                if way == "v1/embeddings":
                    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
                    answer = client.post(f"{address}/{way}", json={"model": "tiny", "input": url})
                else:
                    answer = client.post(f"{address}/{way}", data=fields, files={"image": data})
                assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
                if answer.status_code != 200:
                    assert answer.json()["error"]["message"]
                statuses[answer.status_code] += 1
        assert sum(statuses.values()) == 200
        assert statuses[200] < 200  # all whole would mean that nothing is looked at
        assert search(address) == first


@pytest.mark.slow
def test_kill_9_while_serving(stage1_only: Blip2, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """A server dies in the middle of answers; its index is as it was, and the next server answers the same."""
    built(stage1_only, photos, tmp_path / "i")
    before = {p: p.read_bytes() for p in (tmp_path / "i").rglob("*") if p.is_file()}
    answers = []
    for _ in range(2):
        command = [sys.executable, "-m", "blip2", "serve", "--model", str(tiny), "--index", str(tmp_path / "i")]
        with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            line = server.stdout.readline()
            address = next(word for word in line.split() if word.startswith("http://"))
            for _ in range(200):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{address}/healthz").status_code == 200:
                        break
                time.sleep(0.1)
            answers.append(search(address))
            with httpx.stream("POST", f"{address}/search", json={"text": TEXT, "rerank": 12}, timeout=60):
                os.kill(server.pid, signal.SIGKILL)
        assert server.returncode == -signal.SIGKILL
        assert {p: p.read_bytes() for p in (tmp_path / "i").rglob("*") if p.is_file()} == before
    assert answers[0] == answers[1]
    assert_same(answers[0], truth(stage1_only, photos))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_stopped_says_so(tiny: Path, kind: signal.Signals) -> None:
    command = [sys.executable, "-m", "blip2", "serve", "--model", str(tiny), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert "Ctrl-C stops" in server.stdout.readline()
        server.send_signal(kind)
        try:
            out, _ = server.communicate(timeout=60)
        finally:
            server.kill()
    assert (server.returncode, out) == (0, "blip2: stopped\n")
