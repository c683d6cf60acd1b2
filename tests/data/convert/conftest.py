"""Miniature originals: images unlike each other, and the conversion of a source to samples."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2.data.convert.pipeline import convert
from blip2.data.convert.records import Options, Request, ShardSize


def draw(path: Path, number: int, side: int = 96) -> Path:
    """An image of its own for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def draw_image() -> Callable[..., Path]:
    return draw


Converted = Callable[..., tuple[dict[str, Any], dict[str, dict[str, Any]]]]


@pytest.fixture
def converted(tmp_path: Path) -> Converted:
    """`converted(kind, source, ...)` is the manifest and the JSON of every sample by key."""

    def run(
        kind: str, source: Path, out: Path | None = None, size: str = "1000", **options: Any
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        requested = {name: options.pop(name) for name in ("images", "split", "columns") if name in options}
        target = out or tmp_path / "out"
        request = Request(source, size=ShardSize.parse(size), **requested)
        manifest = convert(request, target, Options(kind, progress=False, **options))
        return manifest, samples_of(target)

    return run


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    """JSON object by key of all shards, with the name of its image member as `member`."""
    samples: dict[str, dict[str, Any]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            for name in names:
                key, _, extension = name.partition(".")
                if extension == "json":
                    handle = tar.extractfile(name)
                    assert handle is not None
                    image = next(n for n in names if n.startswith(f"{key}.") and n != name)
                    samples[key] = {**json.loads(handle.read()), "member": image}
    return samples
