"""Fixtures of every test: seeded generators, no network, and the Flickr8k shards where they exist."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before transformers is imported anywhere: a test that needs a hub is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
SEED = 0


# Files that take longest begin first: with two processes none is left to work alone at the end.
LONG = ("tests/smoke/", "tests/training/test_distributed", "tests/estimate/", "tests/parity/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a file the order stays."""
    items.sort(key=lambda item: next((n for n, part in enumerate(LONG) if item.nodeid.startswith(part)), len(LONG)))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, numpy and (where a test uses it) torch before each test; the value is the seed."""
    random.seed(SEED)
    np.random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)
    return SEED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, in which only the converted towers are the user's."""
    from blip2.io.paths import cache_folder

    towers = cache_folder() / "towers"
    folder = tmp_path_factory.mktemp("cache")
    towers.mkdir(parents=True, exist_ok=True)
    (folder / "towers").symlink_to(towers.resolve(), target_is_directory=True)
    before = os.environ.get("BLIP2_CACHE")
    os.environ["BLIP2_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["BLIP2_CACHE"]
    else:
        os.environ["BLIP2_CACHE"] = before


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Folder with Flickr8k's tar shards; a test that asks for it is skipped where there is none."""
    roots = [Path(os.environ["BLIP2_DATA"])] if os.environ.get("BLIP2_DATA") else []
    candidates = [root / "flickr8k" for root in [*roots, REPOSITORY.parent / "shared"]]
    for folder in candidates:
        if any(folder.glob("dev-*.tar")) and any(folder.glob("train-*.tar")):
            return folder
    pytest.skip(f"no Flickr8k shards in {' or '.join(map(str, candidates))}")


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """`hf(kind)` is (folder, transformers model) for kind `opt`, `t5`, `itm`, `blip` or `clip`; each is built once."""
    from tests import tiny_models

    made: dict[str, tuple[Path, Any]] = {}

    def build(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            made[kind] = tiny_models.save(kind, tmp_path_factory.mktemp("hf") / kind)
        return made[kind]

    return build


@pytest.fixture(scope="session")
def tiny(hf: Callable[[str], tuple[Path, Any]]) -> Path:
    """Folder of a random image-text retrieval model: 5 queries, width 16, 56 px, 4 x 4 patches."""
    return hf("itm")[0]


@pytest.fixture(scope="session")
def tiny_opt(hf: Callable[[str], tuple[Path, Any]]) -> Path:
    """Folder of a random stage-2 model with a small OPT."""
    return hf("opt")[0]


@pytest.fixture(scope="session")
def tiny_t5(hf: Callable[[str], tuple[Path, Any]]) -> Path:
    """Folder of a random stage-2 model with a small T5."""
    return hf("t5")[0]


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test whose numbers are float32's: `auto` is fp32 in it on any processor."""
    monkeypatch.setenv("BLIP2_PRECISION", "fp32")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures of noise, half of them with captions beside them."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(12):
        place = folder / ("below" if n % 3 == 0 else "") / f"p{n:02d}.png"
        Image.fromarray(rng.integers(0, 255, (48, 60, 3), dtype=np.uint8)).save(place)
        if n % 2:
            place.with_suffix(".txt").write_text("a dog on the grass\n" if n % 4 == 1 else "two cats sleep\n")
    return folder
