"""Run folders: where a run keeps its configuration and its newest weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from blip2.configs import RunConfig, from_dict, to_dict
from blip2.errors import CheckpointError, ConfigError
from blip2.io.atomic import write_text
from blip2.weights.checkpoint import stored_config
from blip2.weights.lazy_tensors import Tensors, read_metadata, write_safetensors

CONFIG = "config.yaml"
WEIGHTS = "model.safetensors"
# The weights that scored highest on dev, and their step and score; only where a run keeps them (`eval.best`).
BEST, SCORE = "best", "score.json"
_STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Run:
    """A run that can be loaded: its configuration and its newest complete weights."""

    config: RunConfig
    weights: Path


def open_run(path: str | Path) -> Run:
    """Find a run's weights: a run folder (its best, else its newest), one of its checkpoints, or a file of ours.

    Raises:
        CheckpointError: nothing there, no whole checkpoint yet, or a file of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such run folder or weights file")
    weights = path if path.is_file() else _newest_weights(path)
    stored = read_metadata(weights).get("config")
    if stored is None:
        raise CheckpointError(f"{weights}: not a blip2 weights file (no configuration in its header)")
    return Run(_resolved(stored_config(stored, str(weights)), weights), weights)


def best_score(run: Path) -> float | None:
    """Dev score of the weights that a run keeps as its best; None where it has none."""
    try:
        return float(json.loads((run / BEST / SCORE).read_text("utf-8"))["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def require_new(target: Path) -> None:
    """Refuse a path that is taken, unless it is an empty folder.

    Raises:
        CheckpointError: it exists.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already: give another name, or remove it")


def write_weights(
    path: Path, tensors: Tensors, config: Mapping[str, Any], progress: Callable[[int], object] | None = None
) -> None:
    """Write a weights file of ours: safetensors with the run's configuration in the header."""
    write_safetensors(path, tensors, {"format": "blip2", "config": json.dumps(config)}, progress)


def write_run(
    folder: Path, tensors: Tensors, config: RunConfig, progress: Callable[[int], object] | None = None
) -> None:
    """Write a run's weights and its `config.yaml` into a folder."""
    write_weights(folder / WEIGHTS, tensors, to_dict(config), progress)
    write_config(folder, config)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write `config.yaml` beside and rename."""
    write_text(folder / CONFIG, yaml.safe_dump(to_dict(config), sort_keys=False))


def read_config(path: str | Path) -> RunConfig:
    """Read a `config.yaml` (or the one of a run folder).

    Raises:
        ConfigError: not there, not YAML, or a setting that is unknown or refused.
    """
    path = Path(path)
    path = path / CONFIG if path.is_dir() else path
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: not a run configuration")
    config: RunConfig = from_dict(RunConfig, values, str(path))
    return config


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint of a run, oldest first.

    A checkpoint is renamed into place when it is complete, so one with this name is complete.
    """
    folders = (run / "checkpoints").glob("step-*")
    steps = [(int(m[1]), folder) for folder in folders if (m := _STEP.fullmatch(folder.name))]
    return sorted((step, folder) for step, folder in steps if (folder / WEIGHTS).is_file())


def _resolved(config: RunConfig, weights: Path) -> RunConfig:
    """Models that a run brings along (`./vision`) as folders, wherever the run has been moved to."""

    def place(name: str) -> str:
        if not name.startswith("./"):
            return name
        homes = [folder for folder in weights.parents[:3] if (folder / name).is_dir()]
        if not homes:
            raise CheckpointError(f"{weights}: {name} is not beside it, which the run brought along")
        return str(homes[0] / name[2:])

    return replace(
        config,
        vision=replace(config.vision, name=place(config.vision.name)),
        qformer=replace(config.qformer, init=place(config.qformer.init)),
        language=replace(config.language, name=place(config.language.name)),
    )


def _newest_weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / BEST / WEIGHTS).is_file():
        return folder / BEST / WEIGHTS
    complete = checkpoints(folder)
    if not complete:
        raise CheckpointError(f"{folder}: no whole checkpoint in it (looked in {folder / 'checkpoints'})")
    return complete[-1][1] / WEIGHTS
