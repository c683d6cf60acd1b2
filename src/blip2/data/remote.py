"""Shards of HTTP servers and object stores: fetched once into the cache, whole or not at all.

Samples are read in any order, so a shard is needed on disk as a file. HTTP needs nothing else and
goes on within a shard after a dropped connection; `s3://`, `gs://` and others go through fsspec.
Where `manifest.json` of `blip2 data convert` lies beside the shards, their checksums are compared.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blip2.data.collection import BadSample
from blip2.data.shards.writer import sha256_of
from blip2.errors import DataError
from blip2.io.paths import cache_folder

ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds before the second attempt; doubles with each
TIMEOUT = 60.0  # seconds without a byte
SLOWEST = 4096  # bytes a second, over TIMEOUT, below which an attempt is given up
_AT_ONCE = 4
_CHUNK = 1 << 20
# What a flaky store raises; anything else is an error of ours.
_FLAKY = (OSError, http.client.HTTPException, ValueError)


class _NotThereError(Exception):
    """The store says that there is no such file: asking again is no use."""


def is_remote(spec: str) -> bool:
    """Whether a shard's name is an address."""
    return "://" in spec


def fetch_all(
    urls: list[str], *, wait: float | None = None, progress: bool = True
) -> tuple[list[Path], list[BadSample]]:
    """Local copies of shards in order, without those that could not be had, which are reported.

    Args:
        wait: seconds before the second attempt; None is `FIRST_WAIT`.

    Raises:
        DataError: the cache folder cannot be written, or a package for this kind of address is missing.
    """
    paths: list[Path] = []
    bad: list[BadSample] = []
    wait = FIRST_WAIT if wait is None else wait
    sums = _Sums(wait)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        results = pool.map(lambda url: _fetched(url, sums, wait), urls)
        for url, found in zip(urls, tqdm(results, total=len(urls), unit="shard", disable=not progress), strict=True):
            if isinstance(found, Path):
                paths.append(found)
            else:
                bad.append(BadSample(url, url, found))
    return paths, bad


def cached(url: str) -> Path:
    """Where the copy of a shard is kept."""
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return cache_folder() / "shards" / f"{digest}-{os.path.basename(url)}"


def _fetched(url: str, sums: _Sums, wait: float) -> Path | str:
    """A local copy, or why there is none."""
    target = cached(url)
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        expected = sums.of(url)
        beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        beside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{target.parent}: cannot be written: {error.strerror or error}") from error

    def once() -> Path:
        _download(url, beside)
        if expected and sha256_of(beside) != expected:
            beside.unlink()
            raise ValueError("checksum differs from the manifest's")
        beside.replace(target)
        return target

    try:
        return _patiently(once, wait)
    except _NotThereError:
        return "shard is not there"
    except _FLAKY as error:
        return f"shard cannot be fetched in {ATTEMPTS} attempts ({_cause(error)})"
    finally:
        beside.unlink(missing_ok=True)


def _patiently(work: Callable[[], Any], wait: float) -> Any:
    """The result of work that may fail for a while: waits twice as long each time, a little at random."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except _FLAKY:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(wait * 2**attempt * random.uniform(0.5, 1.0))


class _Sums:
    """SHA-256 by address out of the manifests beside shards; each manifest is fetched once."""

    def __init__(self, wait: float) -> None:
        self.wait, self.known, self.lock = wait, dict[str, dict[str, str]](), threading.Lock()

    def of(self, url: str) -> str | None:
        """The checksum of a shard; None where no manifest tells it."""
        folder, _, name = url.rpartition("/")
        with self.lock:
            if folder not in self.known:
                self.known[folder] = self._read(f"{folder}/manifest.json")
        return self.known[folder].get(name)

    def _read(self, url: str) -> dict[str, str]:
        try:
            shards = _patiently(lambda: json.loads(b"".join(_stream(url, 0)))["shards"], self.wait)
            return {shard["file"]: shard["sha256"] for shard in shards}
        except (_NotThereError, KeyError, TypeError, *_FLAKY):
            return {}


def _download(url: str, beside: Path) -> None:
    """Append what is missing of a file."""
    have = beside.stat().st_size if beside.exists() else 0
    pace = _Pace()
    with beside.open("ab") as handle:
        for chunk in _stream(url, have):
            handle.write(chunk)
            pace.count(len(chunk))


class _Pace:
    """Notices a store that keeps a connection alive and sends next to nothing."""

    def __init__(self) -> None:
        self.since, self.bytes = time.monotonic(), 0

    def count(self, size: int) -> None:
        """Bytes that came; raises OSError where too few came in the last `TIMEOUT` seconds."""
        self.bytes += size
        seconds = time.monotonic() - self.since
        if seconds < TIMEOUT:
            return
        if self.bytes < SLOWEST * seconds:
            raise OSError(f"less than {SLOWEST} bytes a second")
        self.since, self.bytes = time.monotonic(), 0


def _stream(url: str, start: int) -> Iterator[bytes]:
    """Bytes of an address from `start` on; fewer than announced is an OSError."""
    if url.startswith(("http://", "https://")):
        yield from _http(url, start)
        return
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        kind = url.partition(":")[0]
        raise DataError(f"{url}: {error}: pip install the package that fsspec names for {kind}://") from error
    except ValueError as error:
        raise DataError(f"{url}: no store of this kind ({error})") from error
    try:
        with system.open(path, "rb") as handle:
            handle.seek(start)
            while chunk := handle.read(_CHUNK):
                yield chunk
    except FileNotFoundError:
        raise _NotThereError from None
    except Exception as error:  # stores raise what their packages define (botocore's errors are no OSError)
        raise OSError(f"{type(error).__name__}: {error}") from error


def _http(url: str, start: int) -> Iterator[bytes]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            announced = answer.headers.get("Content-Length")
            left = int(announced) if announced is not None else None
            unwanted = start if answer.status != 206 else 0  # a server without ranges sends all again
            while chunk := answer.read1(_CHUNK):  # what is there: `read` would wait for all of it
                left = left - len(chunk) if left is not None else None
                yield chunk[unwanted:]
                unwanted = max(unwanted - len(chunk), 0)
            if left:
                raise OSError("connection closed early")
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):
            raise _NotThereError from None
        if error.code == 416:  # all of it is here
            return
        raise


def _cause(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)
