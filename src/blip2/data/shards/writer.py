"""Writing shards: the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from blip2.data.collection import BadSampleError
from blip2.data.image_formats import format_of
from blip2.data.images import decode_image
from blip2.errors import RunError, os_error_as
from blip2.io.atomic import replacing, write_json


@dataclass(frozen=True)
class Written:
    """A file that was written: its size and SHA-256."""

    bytes: int
    sha256: str


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, dict[str, Any]]]) -> Written:
    """Write (key, image, JSON object) samples as a tar shard, in order; times and owners are zero.

    JPEG, PNG and WebP bytes are kept as they are; images of other kinds become PNG.

    Raises:
        RunError: it cannot be written.
    """
    with os_error_as(RunError, f"{path}: cannot be written"):
        with replacing(path, sync=True) as temporary, temporary.open("wb") as handle:
            out = _Hashing(handle)
            with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                for key, image, entry in samples:
                    suffix, data = stored_image(image)
                    _add(tar, f"{key}{suffix}", data)
                    _add(tar, f"{key}.json", json.dumps(entry, ensure_ascii=False).encode())
        for left in path.parent.glob(f".{path.name}.tmp-*"):  # of a process that was killed
            left.unlink(missing_ok=True)
    return Written(out.count, out.digest.hexdigest())


def write_record(path: Path, value: Any) -> None:
    """Replace a JSON file whole; its folder is made.

    Raises:
        RunError: it cannot be written.
    """
    with os_error_as(RunError, f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)


def stored_image(data: bytes) -> tuple[str, bytes]:
    """Suffix and bytes under which an image goes into a shard.

    Raises:
        BadSampleError: an image of another kind cannot be decoded.
    """
    kind = format_of(data)
    if kind is not None:
        return kind.suffix, data
    buffer = io.BytesIO()
    try:
        decode_image(data).save(buffer, "PNG")
    except OSError:
        raise BadSampleError("image cannot be decoded") from None
    return ".png", buffer.getvalue()


class _Hashing:
    """A file that counts and hashes what is written to it."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle, self.digest, self.count = handle, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.count += len(data)
        return self.handle.write(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
