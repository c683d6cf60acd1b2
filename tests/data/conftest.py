"""Small images, and shards written by the `webdataset` library."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """Bytes of a seeded noise image; `width`, `height`, `kind` and whatever Pillow's `save` takes."""

    def make(number: int = 0, width: int = 24, height: int = 20, kind: str = "JPEG", **options: Any) -> bytes:
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def write_shard() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """Write samples (`__key__` and bytes, text or objects by extension) with webdataset's own writer."""

    def write(path: Path, samples: list[dict[str, Any]]) -> Path:
        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for sample in samples:
                writer.write({name: _bytes(value) if name != "__key__" else value for name, value in sample.items()})
        return path

    return write


@pytest.fixture
def shards(tmp_path: Path, jpeg: Callable[..., bytes], write_shard: Callable[..., Path]) -> Path:
    """Folder of two shards with 7 and 6 samples of two captions each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, numbers in enumerate((range(7), range(7, 13))):
        write_shard(folder / f"part-{shard:05d}.tar", [entry(n, jpeg(n)) for n in numbers])
    return folder


def entry(number: int, image: bytes) -> dict[str, Any]:
    texts = {"image_id": f"photo{number}", "captions": [f"picture {number}", f"a noisy picture {number}"]}
    return {"__key__": f"key{number:03d}", "jpg": image, "json": texts}


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()
