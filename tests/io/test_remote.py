"""Shards from a local server that drops, corrupts and refuses, and from fsspec's memory store."""

from __future__ import annotations

import http.server
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from blip2.data.shards.writer import write_shard
from blip2.data.sources import open_collection
from blip2.errors import DataError
from blip2.io import remote

# What goes wrong with the n-th answer for a shard.
TROUBLE = {"a.tar": ["drop", "refuse", "drop"], "b.tar": ["corrupt", "drop"], "c.tar": ["refuse"] * 99}


def jpeg(seed: int) -> bytes:
    """Bytes that begin like an image; no test here decodes them."""
    return b"\xff\xd8\xff" + random.Random(seed).randbytes(1500)


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves a folder and does what TROUBLE says; with ranges unless told otherwise."""

    folder: Path
    requests: Counter[str]
    ranges = True

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        path = self.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        number, self.requests[name] = self.requests[name], self.requests[name] + 1
        trouble = (TROUBLE.get(name, []) + [""] * 99)[number]
        if trouble == "refuse":
            self.send_error(503)
            return
        data, byte_range = path.read_bytes(), self.headers.get("Range")
        start = int(byte_range.removeprefix("bytes=").rstrip("-")) if byte_range and self.ranges else 0
        body = data[start:]
        if trouble == "corrupt":
            body = body[:600] + bytes(8) + body[608:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble == "drop" else body)

    def log_message(self, *parts: Any) -> None:
        """Quiet."""


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    records = []
    for name in "abc":
        rows = [(f"{name}{n}", jpeg(n), {"captions": [f"{name} {n}"]}) for n in range(3)]
        records.append({"file": f"{name}.tar", **vars(write_shard(folder / f"{name}.tar", rows))})
    (folder / "manifest.json").write_text(json.dumps({"shards": records}))
    handler = type("Handler", (Flaky,), {"folder": folder, "requests": Counter(), "ranges": request.param})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/set", folder
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(autouse=True)
def own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)


def test_flaky_server(server: tuple[str, Path]) -> None:
    address, folder = server
    *copies, refused, missing = remote.fetch_all([f"{address}/{name}.tar" for name in "abcd"], progress=False)
    assert [Path(copy).read_bytes() for copy in copies] == [(folder / f"{name}.tar").read_bytes() for name in "ab"]
    assert str(refused).startswith("shard cannot be fetched in 6 attempts (")
    assert missing == "shard is not there"
    assert not [p for p in Path(copies[0]).parent.iterdir() if ".tmp" in p.name]


def test_what_is_here_is_not_fetched_again(server: tuple[str, Path]) -> None:
    address, folder = server
    first = remote.fetch_all([f"{address}/b.tar"], progress=False)
    (folder / "b.tar").unlink()
    assert remote.fetch_all([f"{address}/b.tar"], progress=False) == first


def test_as_a_data_set(server: tuple[str, Path]) -> None:
    collection = open_collection(f"{server[0]}/{{a,b,c}}.tar")
    assert [s.key for s in collection.samples] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [bad.key for bad in collection.bad] == [f"{server[0]}/c.tar"]
    with pytest.raises(DataError, match="every sample is bad, the first: .*d.tar: shard is not there"):
        open_collection(f"{server[0]}/d.tar")
    with pytest.raises(DataError, match="not shards: give addresses that end in .tar"):
        open_collection(f"{server[0]}/d.zip")


def test_stores_of_fsspec(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [("k", jpeg(0), {"captions": ["a"]})])
    with fsspec.open("memory://bucket/x.tar", "wb") as handle:
        handle.write((tmp_path / "x.tar").read_bytes())
    collection = open_collection("memory://bucket/x.tar")
    assert [s.captions for s in collection.samples] == [("a",)]
    with pytest.raises(DataError, match="shard is not there"):
        open_collection("memory://bucket/y.tar")
    with pytest.raises(DataError, match="nostore://.*: no store of this kind"):
        open_collection("nostore://bucket/y.tar")
