"""The examples of a few-shot evaluation: drawn from training data by a seed, the same for every image."""

from __future__ import annotations

import argparse
from typing import Any

from blip2.data.collection import Collection
from blip2.data.few_shot import Shot, draw_shots
from blip2.data.sources import open_collection
from blip2.errors import ConfigError


def shots_for(options: argparse.Namespace, data: Collection) -> list[Shot]:
    """Examples that an evaluation's options ask for; none where `--shots` is 0.

    Raises:
        ConfigError: fewer than 0, nothing known to draw them from, the evaluated data itself, or together
            with `--candidates`.
    """
    count = getattr(options, "shots", 0)
    if count == 0:
        return []
    if count < 0:
        raise ConfigError(f"--shots is {count}: it must be 0 or more")
    if getattr(options, "candidates", None):
        raise ConfigError("--shots: candidates are ranked without examples: leave out --candidates")
    source = options.shots_data or _train_split(data.name)
    if source == data.name:
        raise ConfigError(f"--shots-data is {source}, the evaluated data itself: give other data")
    return draw_shots(open_collection(source), count, options.shots_seed, questions=options.task == "vqa")


def settings_of_shots(options: argparse.Namespace, shots: list[Shot]) -> dict[str, Any]:
    """What of the examples can move a number; nothing where there are none."""
    if not shots:
        return {}
    return {"shots": len(shots), "shots_seed": options.shots_seed, "shots_keys": [shot.key for shot in shots]}


def _train_split(name: str) -> str:
    base, colon, split = name.partition(":")
    if not colon or "/" in name or split == "train":
        raise ConfigError(f"--shots: {name} has no train split to draw examples from: give --shots-data")
    return f"{base}:train"
