"""What the tasks of an evaluation read before a model is loaded: data, decoding options, and few-shot examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from blip2.configs.checks import require
from blip2.data.collection import Collection
from blip2.data.entries import text_lines
from blip2.data.few_shot import Shot, draw_shots
from blip2.data.sources import open_collection
from blip2.errors import ConfigError, DataError


def open_data(options: argparse.Namespace) -> Collection:
    """The data set that `--data`, `--split` and `--limit` name."""
    require(options.limit is None or options.limit >= 1, "--limit", options.limit, "1 or more")
    return open_collection(f"{options.data}:{options.split}" if options.split else options.data).limited(options.limit)


def require_captions(data: Collection) -> None:
    """Refuse a data set in which an image has no caption.

    Raises:
        DataError: names the first such image.
    """
    bare = next((sample for sample in data.samples if not sample.captions), None)
    if bare is not None:
        raise DataError(f"{data.name}: {bare.key} has no caption to compare with")


def read_lines(path: str, missing: str) -> list[str]:
    """The lines of a file that are not blank, without the space around them.

    Args:
        missing: what the error says of a file without any.

    Raises:
        DataError: it cannot be read, or all its lines are blank.
    """
    try:
        lines = [line.strip() for line in text_lines(Path(path).read_text("utf-8")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise DataError(f"{path}: {missing}")
    return lines


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of `DecodingConfig` that the user gave."""
    names = ("beams", "min_tokens", "max_tokens", "length_penalty", "repetition_penalty", "rerank")
    return {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}


def few_shot_examples(options: argparse.Namespace, data: Collection) -> list[Shot]:
    """The examples of `--shots`, drawn by `--shots-seed`, the same for every image; none where it is 0.

    Raises:
        ConfigError: fewer than 0, no data known to draw them from, the evaluated data itself, or together
            with `--candidates`.
    """
    if options.shots == 0:
        return []
    require(options.shots > 0, "--shots", options.shots, "0 or more")
    if getattr(options, "candidates", None):
        raise ConfigError("--shots: candidates are ranked without examples: leave out --candidates")
    source = options.shots_data or _train_split(data.name)
    if source == data.name:
        raise ConfigError(f"--shots-data is {source}, the evaluated data itself: give other data")
    return draw_shots(open_collection(source), options.shots, options.shots_seed, questions=options.task == "vqa")


def few_shot_settings(options: argparse.Namespace, shots: list[Shot]) -> dict[str, Any]:
    """What of the examples can move a number; empty where there are none."""
    if not shots:
        return {}
    return {"shots": len(shots), "shots_seed": options.shots_seed, "shots_keys": [shot.key for shot in shots]}


def _train_split(name: str) -> str:
    base, colon, split = name.partition(":")
    if not colon or "/" in name or split == "train":
        raise ConfigError(f"--shots: {name} has no train split to draw examples from: give --shots-data")
    return f"{base}:train"
