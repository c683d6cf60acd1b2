"""Perceptual hashes of 64 bits, and pairs of near-equal ones among millions.

The hash is the DCT one ("pHash"): signs of the 64 lowest frequencies of a 32 x 32 grey image
against their median. Re-encoded, scaled and lightly edited copies differ in few bits.

Shape letters: N hashes, K pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from blip2.ops.devices import to_list

BITS = 64
# Bits in which copies may differ. Of 250 images of Flickr8k re-encoded, scaled, made brighter or cropped by 2%,
# 95 to 100% stay within 6; two different ones of them differ in 14 or more.
THRESHOLD = 6
_SIDE = 32


def _dct_rows() -> np.ndarray:
    """The first 8 rows [8, 32] of the DCT-II of 32 values."""
    k, n = np.arange(8)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE))


_DCT = _dct_rows()


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit hash of an RGB image."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), np.float64)
    low = (_DCT @ grey @ _DCT.T).ravel()
    # Rounded: sums that are equal on paper must not differ by the order of additions.
    low = np.round(low, 6)
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes_N: np.ndarray, threshold: int = THRESHOLD) -> np.ndarray:
    """All pairs of hashes at most `threshold` bits apart.

    Of threshold + 2 bands of bits, hashes that are close agree in two or more (pigeonhole), so only
    hashes with two equal bands are compared: exact, and far from quadratic. Of many equal hashes
    every later one is paired with the first alone.

    Args:
        hashes_N: uint64.

    Returns:
        int64 [K, 3]: earlier place, later place, distance; sorted by the later, then the earlier.
    """
    unique, first, back = np.unique(hashes_N, return_index=True, return_inverse=True)
    parts = [_equal(first, back.ravel())]
    near: list[np.ndarray] = []
    for masks in itertools.combinations(_masks(threshold + 2), 2):
        near += _within(unique, unique & (masks[0] | masks[1]), threshold)
    if near:
        left, right, distance = np.unique(np.concatenate(near, axis=1), axis=1)
        places = np.sort(np.stack([first[left], first[right]]), axis=0)
        parts.append(np.stack([*places, distance], axis=1))
    pairs: np.ndarray = np.concatenate(parts).astype(np.int64)
    return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]


def keep_first(pairs_K3: np.ndarray) -> dict[int, tuple[int, int]]:
    """What to drop so that no pair is left: later place -> (kept place that it repeats, distance).

    Goes through the data in order and compares with what is kept only: a chain of small changes
    does not make its two ends one image.
    """
    dropped: dict[int, tuple[int, int]] = {}
    for earlier, later, distance in to_list(pairs_K3):
        if later in dropped:
            continue
        if earlier not in dropped:
            dropped[later] = (earlier, distance)
        elif distance == 0:  # equal to a dropped one: near to what that one repeats
            dropped[later] = dropped[earlier]
    return dropped


def nearest(hashes_N: np.ndarray, against_M: np.ndarray, threshold: int = THRESHOLD) -> dict[int, tuple[int, int]]:
    """Hashes of one set that another holds too: place -> (nearest place in the other, distance)."""
    own, back = np.unique(hashes_N, return_inverse=True)
    other, first = np.unique(against_M, return_index=True)
    best: dict[int, tuple[int, int]] = {}
    for earlier, later, distance in to_list(near_pairs(np.concatenate([other, own]), threshold)):
        if earlier < len(other) <= later and distance < best.get(later, (0, BITS + 1))[1]:
            best[later] = (int(first[earlier]), distance)
    hit = {at - len(other): match for at, match in best.items()}
    return {n: hit[at] for n, at in enumerate(to_list(back.ravel())) if at in hit}


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of bits in which uint64 values differ, elementwise."""
    differ = np.bitwise_xor(a, b)
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(differ).astype(np.int64)
    octets = np.ascontiguousarray(differ)[..., None].view(np.uint8)
    return np.unpackbits(octets, axis=-1).sum(-1, dtype=np.int64)


def _masks(count: int) -> list[np.uint64]:
    """`count` bands of bits of nearly equal width."""
    edges = to_list(np.linspace(0, BITS, count + 1).round().astype(int))
    return [np.uint64((1 << high) - (1 << low)) for low, high in itertools.pairwise(edges)]


def _within(hashes_N: np.ndarray, band_N: np.ndarray, threshold: int) -> Iterator[np.ndarray]:
    """[3, K] pairs (places, distance) of hashes with equal bands."""
    order = np.argsort(band_N, kind="stable")
    sorted_band, sorted_hashes = band_N[order], hashes_N[order]
    at = np.arange(len(order) - 1)
    step = 1
    while len(at):
        at = at[sorted_band[at] == sorted_band[at + step]]
        distance = distances(sorted_hashes[at], sorted_hashes[at + step])
        near = at[distance <= threshold]
        if len(near):
            places = np.sort(np.stack([order[near], order[near + step]]), axis=0)
            yield np.concatenate([places, distance[distance <= threshold][None]])
        step += 1
        at = at[at + step < len(order)]


def _equal(first: np.ndarray, back: np.ndarray) -> np.ndarray:
    """[K, 3] pairs of a first hash and a later equal one."""
    later = np.flatnonzero(first[back] != np.arange(len(back)))
    return np.stack([first[back][later], later, np.zeros_like(later)], axis=1)
