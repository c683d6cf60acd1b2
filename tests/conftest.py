"""Fixtures of every test: seeded generators, no network, and the Flickr8k shards where they exist."""

from __future__ import annotations

import os
import random
import sys
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


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Folder with Flickr8k's tar shards; a test that asks for it is skipped where there is none."""
    roots = [Path(os.environ["BLIP2_DATA"])] if os.environ.get("BLIP2_DATA") else []
    candidates = [root / "flickr8k" for root in [*roots, REPOSITORY.parent / "shared"]]
    for folder in candidates:
        if any(folder.glob("dev-*.tar")) and any(folder.glob("train-*.tar")):
            return folder
    pytest.skip(f"no Flickr8k shards in {' or '.join(map(str, candidates))}")
