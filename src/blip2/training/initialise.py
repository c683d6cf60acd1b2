"""What a run starts from: its folder, and the weights that `init` names."""

from __future__ import annotations

from pathlib import Path

from blip2.configs import RunConfig, flat
from blip2.errors import ConfigError, RunError, os_error_as
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.weights import runs
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.formats import open_checkpoint, stage1_behind
from blip2.weights.loading import (
    IMAGE_PLACES,
    STAGE1_HEADS,
    STAGE1_ONLY,
    STAGE2_ONLY,
    VISION,
    Allowed,
    fill,
    is_text_branch,
    new_adapters,
)

# Settings that a resumed run may change; with any other changed it would be another run.
CHANGEABLE = {
    "out",
    "train.steps",
    "train.eval_every",
    "train.save_every",
    "train.keep",
    "train.device",
    "train.parallel",
    "train.precision",
    "train.checkpoint",
    "train.head_chunk",
    "train.early_backward",
    "train.compile",
    "data.workers",
}


def run_folder(config: RunConfig) -> Path:
    """Where a run lives: `out`, or `runs/<recipe>`."""
    return Path(config.out or f"runs/{config.recipe.replace('/', '-')}")


def claim(folder: Path, config: RunConfig) -> None:
    """Make the run folder, or check that the existing one belongs to the same run.

    Raises:
        ConfigError: the folder belongs to another run, or is no run folder.
        RunError: it cannot be written.
    """
    known = folder / runs.CONFIG
    if known.exists():
        _same_run(folder, runs.read_config(known), config)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty and not a run folder: choose another --out")
    with os_error_as(RunError, f"{folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_config(folder, config)


def _same_run(folder: Path, before: RunConfig, now: RunConfig) -> None:
    old, new = flat(before), flat(now)
    for name in old:
        if name not in CHANGEABLE and old[name] != new[name]:
            raise ConfigError(
                f"{folder} is a run with {name} = {old[name]!r}, not {new[name]!r}: choose another --out, "
                f"or go on with `blip2 train {folder}`"
            )


def initialise(model: Stage1 | Stage2, config: RunConfig) -> list[str]:
    """Load what `init` names; returns lines that say what came from where.

    Raises:
        ConfigError: a checkpoint of other towers, or of a later stage.
        CheckpointError: it cannot be read, or its weights do not fit.
    """
    lines = [f"Q-Former started from {config.qformer.init}"]
    if config.init is None:
        if config.stage == "stage2":
            lines.append("no --init: stage 2 starts without stage 1")
        return lines
    start = open_checkpoint(config.init)
    if start.format == "blip2":
        _same_towers(start.config, config)
    _require_encoder(start, config)
    tensors, text = dict(start.tensors), ""
    if config.qformer.instruction and not any(map(is_text_branch, tensors)):
        stage1 = open_checkpoint(config.init_text) if config.init_text else stage1_behind(config.init)
        tensors |= {name: lazy for name, lazy in stage1.tensors.items() if is_text_branch(name)}
        text = f"; text branch from {stage1.source}"
    return [*lines[: start.partial], fill(model, start.source, tensors, _allowed(start, config)).line() + text]


def _require_encoder(start: Checkpoint, config: RunConfig) -> None:
    """Refuse a checkpoint whose fine-tuned image encoder would be replaced by the original one."""
    if start.vision:
        raise ConfigError(
            f"--init {config.init} brings a fine-tuned image encoder: run `blip2 convert {config.init} FOLDER --to "
            "blip2`, then train with --init FOLDER --vision.name FOLDER/vision"
        )
    if start.config.vision.train and start.format == "blip2" and not config.vision.train:
        raise ConfigError(f"--init {config.init} fine-tuned its image encoder: go on with --vision.train true")


def _allowed(start: Checkpoint, config: RunConfig) -> Allowed:
    """Which tensors may be left out, start fresh or be adapted when this run starts from a checkpoint."""
    if config.stage == "stage1" and start.config.stage == "stage2":
        raise ConfigError(f"--init {config.init} is a stage-2 checkpoint: stage 1 starts from stage 1")
    onwards = config.stage == "stage2" and start.config.stage == "stage1"
    encoder = () if any(name.startswith(VISION) for name in start.tensors) else (VISION,)
    return Allowed(
        left_out=(STAGE1_HEADS if config.qformer.instruction else STAGE1_ONLY) if onwards else (),
        fresh=(
            *start.allowed.fresh,
            *(STAGE2_ONLY if onwards else ()),
            *new_adapters(start.tensors),
            *encoder,
            IMAGE_PLACES,
        ),
        adapt=True,
    )


def _same_towers(before: RunConfig, now: RunConfig) -> None:
    """Refuse image features that differ from those of the checkpoint's training, even of the same width.

    Folders are not compared: they may have moved.
    """
    for name in ("vision.name", "vision.layer", "vision.pool", "qformer.init"):
        old, new = flat(before)[name], flat(now)[name]
        folders = any(isinstance(v, str) and Path(v).is_dir() for v in (old, new))
        if old != new and not folders:
            raise ConfigError(f"--init {now.init} was trained with {name} = {old!r}, this run has {new!r}")
