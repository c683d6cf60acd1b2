"""Weighted mixtures of data sets: what is in them, and in which order an epoch goes through them.

A part of weight 2 is seen twice an epoch, one of weight 0.5 by halves, each half in turn. The order
is a pure function of (seed, epoch), so that resuming needs the step alone, as without a mixture.

Shape letters: U usable samples, K places of an epoch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blip2.errors import ConfigError
from blip2.ops.devices import to_list


@dataclass(frozen=True)
class Part:
    """A data set of a mixture, as it was named, and its weight."""

    spec: str
    weight: float


def parse_mixture(spec: str) -> list[Part]:
    """The parts of `a.tar*2+b.tar`; one part of weight 1 where nothing is mixed.

    A name that exists is never taken apart.

    Raises:
        ConfigError: a weight of zero.
    """
    parts = spec.split("+")
    if Path(spec).expanduser().exists() or not all(part.strip() for part in parts):
        return [Part(spec, 1.0)]
    mixture = []
    for part in map(str.strip, parts):
        weighted = re.fullmatch(r"(.*[^*\s])\s*\*\s*(\d+(?:\.\d+)?)", part)
        name, weight = (weighted[1], float(weighted[2])) if weighted else (part, 1.0)
        if weight == 0:
            raise ConfigError(f"data.train: {part} has weight 0: leave it out, or give it a positive one")
        mixture.append(Part(name, weight))
    return mixture


def epoch_size(part_U: np.ndarray, weights: tuple[float, ...]) -> int:
    """Places of an epoch: for each part its samples times its weight, rounded."""
    return sum(_takes(int((part_U == n).sum()), weight) for n, weight in enumerate(weights))


def epoch_order(part_U: np.ndarray, weights: tuple[float, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Places [K] among the usable samples, and how often [K] each has been seen before in all the run.

    Every part is an endless row of permutations, of which each epoch takes the next stretch: no
    sample is seen again before all of its part were.

    Args:
        part_U: part of each usable sample.
    """
    places, turns = [], []
    for number, weight in enumerate(weights):
        own = np.flatnonzero(part_U == number)
        takes = _takes(len(own), weight)
        if not takes:
            continue
        at = np.arange(epoch * takes, (epoch + 1) * takes)
        for turn in to_list(np.unique(at // len(own))):
            order = np.random.default_rng([seed, number, turn, 0, 1]).permutation(own)
            stretch = at[at // len(own) == turn] % len(own)
            places.append(order[stretch])
            turns.append(np.full(len(stretch), turn))
    mixed = np.random.default_rng([seed, epoch]).permutation(sum(map(len, places)))
    return np.concatenate(places)[mixed], np.concatenate(turns)[mixed]


def _takes(samples: int, weight: float) -> int:
    return max(round(samples * weight), 1) if samples else 0
