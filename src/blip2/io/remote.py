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
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from blip2.errors import DataError, os_error_as
from blip2.io.atomic import replacing
from blip2.io.paths import cache_folder

ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds before the second attempt; doubles with each
TIMEOUT = 60.0  # seconds without a byte
SLOWEST = 4096  # bytes a second, over TIMEOUT, below which an attempt is given up
_AT_ONCE = 4
_CHUNK = 1 << 20
# What a flaky store raises; anything else is an error of ours.
_FLAKY = (OSError, http.client.HTTPException, ValueError)
T = TypeVar("T")


class _NotThereError(Exception):
    """The store says that there is no such file: asking again is no use."""


def is_remote(name: str) -> bool:
    """Whether a file's name is an address."""
    return "://" in name


def fetch_all(urls: list[str], *, progress: bool = True) -> list[Path | str]:
    """For each address its local copy, or the reason why it could not be had.

    Raises:
        DataError: the cache folder cannot be written, or a package for this kind of address is missing.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        folders = list(dict.fromkeys(_folder(url) for url in urls if not cached(url).is_file()))
        checksums = dict(zip(folders, pool.map(_checksums, folders), strict=True))
        results = pool.map(lambda url: _fetch(url, checksums), urls)
        return list(tqdm(results, total=len(urls), unit="shard", disable=not progress))


def cached(url: str) -> Path:
    """Where the copy of a shard is kept."""
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return cache_folder() / "shards" / f"{digest}-{os.path.basename(url)}"


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _fetch(url: str, checksums: dict[str, dict[str, str]]) -> Path | str:
    """A local copy, or why there is none."""
    target = cached(url)
    if target.is_file():
        return target
    with os_error_as(DataError, f"{target.parent}: cannot be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
    sha256 = checksums.get(_folder(url), {}).get(os.path.basename(url))
    try:
        with replacing(target) as temporary:
            _retry(lambda: _download(url, temporary, sha256))
        return target
    except _NotThereError:
        return "shard is not there"
    except _FLAKY as error:
        cause = getattr(error, "reason", None) or str(error) or type(error).__name__
        return f"shard cannot be fetched in {ATTEMPTS} attempts ({cause})"


def _retry(work: Callable[[], T]) -> T:
    """The result of work that may fail for a while: waits twice as long each time, a little at random."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return work()
        except _FLAKY:
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0))
    return work()


def _checksums(folder: str) -> dict[str, str]:
    """SHA-256 by file out of the manifest beside shards; empty where there is none."""
    try:
        shards = _retry(lambda: json.loads(b"".join(_stream(f"{folder}/manifest.json", 0)))["shards"])
        return {shard["file"]: shard["sha256"] for shard in shards}
    except (_NotThereError, KeyError, TypeError, *_FLAKY):
        return {}


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Append what is missing of a file; one of another checksum is removed, and a crawling store is an OSError."""
    since, received = time.monotonic(), 0
    with path.open("ab") as handle:
        for chunk in _stream(url, handle.tell()):
            handle.write(chunk)
            received += len(chunk)
            seconds = time.monotonic() - since
            if seconds >= TIMEOUT:
                if received < SLOWEST * seconds:
                    raise OSError(f"less than {SLOWEST} bytes a second")
                since, received = time.monotonic(), 0
    if sha256:
        with path.open("rb") as handle:
            actual = hashlib.file_digest(handle, "sha256").hexdigest()
        if actual != sha256:
            path.unlink()
            raise ValueError("checksum differs from the manifest's")


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
            missing = int(announced) if announced is not None else None
            repeated = start if answer.status != 206 else 0  # a server without ranges sends all again
            while chunk := answer.read1(_CHUNK):  # what is there: `read` would wait for all of it
                missing = missing - len(chunk) if missing is not None else None
                yield chunk[repeated:]
                repeated = max(repeated - len(chunk), 0)
            if missing:
                raise OSError("connection closed early")
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):
            raise _NotThereError from None
        if error.code == 416:  # all of it is here
            return
        raise
