"""Which samples stay: near-duplicates within a source, and images of evaluation sets in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from blip2.data.convert.scan import Scan
from blip2.data.hashes import keep_first, near_pairs, nearest

Place = tuple[int, int]  # unit, sample within it


@dataclass(frozen=True)
class Decision:
    """Which images repeat others, and which samples are dropped.

    Args:
        duplicates: place -> (place of the earlier image that it repeats, distance in bits).
        leaks: place -> (key in an evaluation set, name of that set, distance in bits).
        dropped: by unit, the samples that are not written.
    """

    duplicates: dict[Place, tuple[Place, int]]
    leaks: dict[Place, tuple[str, str, int]]
    dropped: Mapping[int, frozenset[int]]

    def kept(self, unit: int, scan: Scan) -> list[str]:
        """Keys of a unit that are written."""
        dropped = self.dropped.get(unit, frozenset())
        return [key for at, key in enumerate(scan.keys) if at not in dropped]

    def fingerprint(self, unit: int) -> str:
        """Changes when another set of a unit's samples is dropped."""
        mine = sorted(self.dropped.get(unit, ()))
        return hashlib.blake2b(repr(mine).encode(), digest_size=8).hexdigest()

    def lines(self, scans: list[Scan]) -> list[dict[str, Any]]:
        """An object per duplicate or leak, in the order of the data."""
        lines: list[dict[str, Any]] = []
        for place in sorted(self.duplicates.keys() | self.leaks.keys()):
            dropped = place[1] in self.dropped.get(place[0], ())
            line: dict[str, Any] = {"key": scans[place[0]].keys[place[1]], "dropped": dropped}
            if place in self.leaks:
                key, spec, distance = self.leaks[place]
                line |= {"leak": key, "of": spec, "bits": distance}
            else:
                (unit, at), distance = self.duplicates[place]
                line |= {"duplicate": scans[unit].keys[at], "bits": distance}
            lines.append(line)
        return lines


def decide(
    scans: list[Scan], evaluation: Mapping[str, Mapping[str, int]], threshold: int, drop_duplicates: bool
) -> Decision:
    """Compare every image with the evaluation sets and with the earlier ones of the source.

    Samples that share an `image_id` are the same image by intent and no duplicates.

    Args:
        evaluation: hashes by key, by the name of a set.
        threshold: bits in which the hashes of copies may differ.
    """
    places: list[Place] = [(unit, at) for unit, scan in enumerate(scans) for at in range(len(scan.keys))]
    hashes = np.array([int(value, 16) for scan in scans for value in scan.hashes], np.uint64)
    leaks: dict[Place, tuple[str, str, int]] = {}
    for spec, known in evaluation.items():
        keys = list(known)
        for n, (match, distance) in nearest(hashes, np.array(list(known.values()), np.uint64), threshold).items():
            leaks.setdefault(places[n], (keys[match], spec, distance))
    duplicates = {
        places[later]: (places[earlier], distance)
        for later, (earlier, distance) in keep_first(near_pairs(hashes, threshold)).items()
        if _image_id(scans, places[later]) != _image_id(scans, places[earlier])
    }
    dropped: dict[int, set[int]] = {}
    for unit, at in leaks.keys() | (duplicates.keys() if drop_duplicates else set()):
        dropped.setdefault(unit, set()).add(at)
    return Decision(duplicates, leaks, {unit: frozenset(places) for unit, places in dropped.items()})


def _image_id(scans: list[Scan], place: Place) -> str:
    return scans[place[0]].image_ids[place[1]]
