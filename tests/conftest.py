"""Fixtures of every test: seeded generators, no network, and the Flickr8k shards where they exist."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported anywhere: a test that needs a hub is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SEED = 0


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
    from blip2.cache import cache_folder

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


def _tiny(kind: str, folder: Path) -> Path:
    """A random model of the parity tests, as a folder of transformers."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parent / "parity" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.save(kind, folder / kind)
    return folder / kind


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random image-text retrieval model: 5 queries, width 16, 56 px, 4 x 4 patches."""
    return _tiny("itm", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random stage-2 model with a small OPT."""
    return _tiny("opt", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random stage-2 model with a small T5."""
    return _tiny("t5", tmp_path_factory.mktemp("tiny"))
