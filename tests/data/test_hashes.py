"""Perceptual hashes of copies, and the banded search against all pairs."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from blip2.data.hashes import distances, keep_first, near_pairs, nearest, perceptual_hash


def scene(number: int, side: int = 160) -> Image.Image:
    """A smooth random image, as photos are."""
    values = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


def bits(a: Image.Image, b: Image.Image) -> int:
    return (perceptual_hash(a) ^ perceptual_hash(b)).bit_count()


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_copies_are_near_and_others_far() -> None:
    images = [scene(n) for n in range(20)]
    for image in images:
        copies = (
            recompressed(image, 40),
            image.resize((90, 90), Image.Resampling.LANCZOS),
            ImageEnhance.Brightness(image).enhance(0.9),
            image.filter(ImageFilter.GaussianBlur(1)),
        )
        assert [bits(image, copy) <= 6 for copy in copies] == [True] * 4
    others = [bits(a, b) for n, a in enumerate(images) for b in images[:n]]
    assert min(others) > 10


def test_hash_by_hand() -> None:
    # brighter to the right: the first horizontal frequency is negative, the mean positive
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))).convert("RGB")
    hashed = f"{perceptual_hash(ramp):064b}"
    assert hashed[0] == "1"
    assert hashed[1] == "0"
    assert perceptual_hash(ramp.transpose(Image.Transpose.ROTATE_90)) != perceptual_hash(ramp)


@pytest.mark.parametrize("threshold", [0, 1, 3, 4, 7])
def test_pairs_equal_the_plain_comparison(threshold: int) -> None:
    rng = np.random.default_rng(threshold)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    flips = np.zeros(300, np.uint64)
    for n in range(300):
        for bit in rng.choice(64, rng.integers(0, 9), replace=False):
            flips[n] ^= np.uint64(1) << np.uint64(bit)
    hashes = base[rng.integers(0, 60, 300)] ^ flips
    apart = distances(hashes[:, None], hashes[None, :])
    expected = {(i, j, int(apart[i, j])) for j in range(300) for i in range(j) if apart[i, j] <= threshold}
    pairs = set(map(tuple, near_pairs(hashes, threshold).tolist()))
    assert pairs <= expected
    # only pairs of which one end equals an earlier hash are left to that one
    first = {j: min(i for i in range(300) if hashes[i] == hashes[j]) for j in range(300)}
    assert {tuple(sorted((first[i], first[j]))) for i, j, _ in expected if first[i] != first[j]} <= {
        (i, j) for i, j, _ in pairs
    }
    left = [n for n in range(300) if n not in keep_first(near_pairs(hashes, threshold))]
    assert all(apart[i, j] > threshold for i in left for j in left if i < j)


def test_first_is_kept_and_chains_do_not_join_their_ends() -> None:
    a, b, c = 0, 0b111, 0b111111
    hashes = np.array([a, b, c, b, a], np.uint64)
    assert keep_first(near_pairs(hashes, 3)) == {1: (0, 3), 3: (0, 3), 4: (0, 0)}


def test_nearest_of_another_set() -> None:
    other = np.array([0b1111, 0, 2**60], np.uint64)
    own = np.array([0b1, 0b111, 2**40 + 7 * 2**50, 2**60, 0b1], np.uint64)
    matches = nearest(own, other, 3)
    assert matches == {0: (1, 1), 1: (0, 1), 3: (2, 0), 4: (1, 1)}
    assert nearest(own, np.array([], np.uint64), 3) == {}


def test_no_hashes_at_all() -> None:
    assert near_pairs(np.array([], np.uint64)).shape == (0, 3)
    assert keep_first(near_pairs(np.array([5], np.uint64))) == {}
