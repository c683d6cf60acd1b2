"""A tiny random stage-1 model, as the folder of transformers that parity tests use, and pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random image-text retrieval model: 5 queries, width 16, 56 px, 4 x 4 patches."""
    source = Path(__file__).parents[1] / "parity" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tiny") / "itm"
    module.save("itm", folder)
    return folder


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
