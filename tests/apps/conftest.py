"""Pictures to index and look into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
