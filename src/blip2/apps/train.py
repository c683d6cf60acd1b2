"""`blip2 train`: from a configuration to a run folder, resumed where one is there."""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2 import __version__
from blip2.apps.dev import DevEvaluator
from blip2.apps.report import write_report
from blip2.cache import cache_folder
from blip2.configs import RunConfig, to_dict
from blip2.data.batch import Batch
from blip2.data.dataset import TrainingBatches
from blip2.data.features import FeatureCache
from blip2.data.samples import Collection
from blip2.data.sources import open_collection
from blip2.errors import ConfigError, RunError
from blip2.inference import Blip2
from blip2.models.build import build, is_bert
from blip2.models.freezing import parameter_table
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision_encoder import VisionEncoder
from blip2.ops import distributed
from blip2.training.incontext import InContextObjective
from blip2.training.memory import apply_settings
from blip2.training.metrics import format_seconds
from blip2.training.objectives import Stage1Objective, Stage2Objective
from blip2.training.parallel import autocast, fast_bf16, pick_device, process_group
from blip2.training.trainer import Outcome, Trainer
from blip2.weights import runs
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.checkpoints import open_checkpoint, stage1_behind
from blip2.weights.loading import (
    STAGE1_HEADS,
    STAGE1_ONLY,
    STAGE2_ONLY,
    VISION,
    Allowed,
    fill,
    is_text_branch,
    new_adapters,
)

# Settings that a resumed run may change; any other would make it another run.
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
    "train.compile",
    "data.workers",
}


def train(config: RunConfig) -> int:
    """Run a configuration to its end, or resume the run in its folder.

    Returns:
        Exit code: 0 done, 130 after Ctrl-C, 143 after SIGTERM; both saved.
    """
    device = pick_device(config.train.device)
    with process_group(device):
        return _train(config, device)


def run_folder(config: RunConfig) -> Path:
    """Where a run lives: `out`, or `runs/<recipe>`."""
    return Path(config.out or f"runs/{config.recipe.replace('/', '-')}")


def _train(config: RunConfig, device: torch.device) -> int:
    folder = run_folder(config)
    if distributed.rank() == 0:
        _claim(folder, config)
    distributed.barrier()
    resumed = runs.checkpoints(folder)
    data = open_collection(config.data.train).limited(config.data.limit)
    dev = None
    if config.data.dev and config.eval.images:
        dev = open_collection(config.data.dev).limited(config.data.dev_limit).limited(config.eval.images)
    model = build(config, start=config.init is None or is_bert(config.qformer.init), device=device)
    loaded = [] if resumed else _initialise(model, config)
    model.to(device)
    vision = model.vision
    assert isinstance(vision, VisionEncoder)
    _describe(config, model, data, dev, loaded, device)
    with autocast(device, config.train.precision):
        caches = _caches(config, data, dev, vision, device)
    trainer, batches, evaluator = _assemble(config, folder, model, data, dev, caches, device)
    step = trainer.resume()
    if step:
        _say(f"resuming {folder} after step {step}")
    if step >= config.train.steps:
        _say(f"{folder} is complete: {step} steps done; raise --steps to go on")
        return 0
    outcome = trainer.run()
    if distributed.rank() == 0:
        _finish(config, folder, model, outcome, evaluator, batches, loaded, device, step)
    return 0 if outcome.interrupted is None else 128 + outcome.interrupted


def _claim(folder: Path, config: RunConfig) -> None:
    """Make the run folder, or check that the one there is of the same run."""
    known = folder / runs.CONFIG
    if known.exists():
        _same_run(folder, runs.read_config(known), config)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty and not a run folder: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_config(folder, config)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error


def _same_run(folder: Path, before: RunConfig, now: RunConfig) -> None:
    old, new = _flat(to_dict(before)), _flat(to_dict(now))
    for name in old:
        if name not in CHANGEABLE and old[name] != new[name]:
            raise ConfigError(
                f"{folder} is a run with {name} = {old[name]!r}, not {new[name]!r}: choose another --out, "
                f"or go on with `blip2 train {folder}`"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _initialise(model: Stage1 | Stage2, config: RunConfig) -> list[str]:
    """Load what `init` names; returns lines that say what came from where."""
    lines = [f"Q-Former started from {config.qformer.init}"]
    if config.init is None:
        if config.stage == "stage2":
            lines.append("no --init: stage 2 starts without stage 1")
        return lines
    found = open_checkpoint(config.init)
    if found.format == "blip2":
        _same_towers(found.config, config)
    _require_encoder(found, config)
    tensors, text = dict(found.tensors), ""
    if config.qformer.question and not any(map(is_text_branch, tensors)):
        stage1 = open_checkpoint(config.init_text) if config.init_text else stage1_behind(config.init)
        tensors |= {name: lazy for name, lazy in stage1.tensors.items() if is_text_branch(name)}
        text = f"; text branch from {stage1.source}"
    return [*lines[: found.partial], fill(model, found.source, tensors, _allowed(found, config)).line() + text]


def _require_encoder(found: Checkpoint, config: RunConfig) -> None:
    """A fine-tuned image encoder that comes along is used, or refused; never silently replaced."""
    if found.vision:
        raise ConfigError(
            f"--init {config.init} brings a fine-tuned image encoder: run `blip2 convert {config.init} FOLDER --to "
            "blip2`, then train with --init FOLDER --vision.name FOLDER/vision"
        )
    if found.config.vision.train and found.format == "blip2" and not config.vision.train:
        raise ConfigError(f"--init {config.init} fine-tuned its image encoder: go on with --vision.train true")


def _allowed(found: Checkpoint, config: RunConfig) -> Allowed:
    """What starting this run from a checkpoint may leave out, start fresh and adapt."""
    if config.stage == "stage1" and found.config.stage == "stage2":
        raise ConfigError(f"--init {config.init} is a stage-2 checkpoint: stage 1 starts from stage 1")
    over = config.stage == "stage2" and found.config.stage == "stage1"
    encoder = () if any(name.startswith(VISION) for name in found.tensors) else (VISION,)
    return Allowed(
        left_out=(STAGE1_HEADS if config.qformer.question else STAGE1_ONLY) if over else (),
        fresh=(*found.allowed.fresh, *(STAGE2_ONLY if over else ()), *new_adapters(found.tensors), *encoder),
        adapt=True,
    )


def _same_towers(before: RunConfig, now: RunConfig) -> None:
    """Other image features than it was trained on are refused, even of the same width.

    Folders are not compared: they may have moved.
    """
    for name in ("vision.name", "vision.layer", "vision.pool", "qformer.init"):
        old, new = _flat(to_dict(before))[name], _flat(to_dict(now))[name]
        folders = any(isinstance(v, str) and Path(v).is_dir() for v in (old, new))
        if old != new and not folders:
            raise ConfigError(f"--init {now.init} was trained with {name} = {old!r}, this run has {new!r}")


def _caches(
    config: RunConfig, data: Collection, dev: Collection | None, vision: VisionEncoder, device: torch.device
) -> tuple[FeatureCache | None, FeatureCache | None]:
    """Feature caches of train and dev; one process builds, the others wait at its lock and open."""
    if not config.data.cache_features:
        return None, None

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return vision(pixels.to(device))

    made = partial(
        FeatureCache.open_or_build,
        cache_folder() / "features",
        spec=_spec(config, vision),
        encoder_id=vision.id,
        encode=encode,
        crop_min=config.data.crop_min,
        seed=config.train.seed,
        rank=distributed.rank(),
    )
    return made(data, views=config.data.cache_views), made(dev, views=1) if dev is not None else None


def _spec(config: RunConfig, vision: VisionEncoder) -> Any:
    from blip2.data.images import ImageSpec

    return ImageSpec(vision.size, vision.mean, vision.std, config.vision.resize)


def _assemble(
    config: RunConfig,
    folder: Path,
    model: Stage1 | Stage2,
    data: Collection,
    dev: Collection | None,
    caches: tuple[FeatureCache | None, FeatureCache | None],
    device: torch.device,
) -> tuple[Trainer, TrainingBatches, DevEvaluator | None]:
    assert isinstance(model.vision, VisionEncoder)
    apply_settings(model, config.train)
    frozen: list[nn.Module] = [model.vision] if model.vision.frozen else []
    if isinstance(model, Stage1):
        user = Blip2(config, stage1=model)
        objective: nn.Module = Stage1Objective(
            model,
            user.text_tokenizer,
            config.loss,
            config.train.seed,
            config.train.accumulate,
            config.vision.token_drop,
        )
    else:
        user = Blip2(config, stage2=model)
        questions = user.text_tokenizer if config.qformer.question else None
        parts = (
            model,
            user.language_tokenizer,
            config.language,
            config.train.seed,
            questions,
            config.vision.token_drop,
        )
        shots = config.data.shots
        objective = InContextObjective(*parts, shots=shots) if shots else Stage2Objective(*parts)
        frozen.append(model.language_model)
    batches = TrainingBatches(
        data,
        batch=config.train.batch,
        seed=config.train.seed,
        spec=user.image_spec,
        features=caches[0],
        augment=config.data.augment,
        crop_min=config.data.crop_min,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=_workers(config),
        texts=config.data.texts,
        texts_per_image=config.data.texts_per_image,
        clean=config.data.clean,
    )
    evaluator = DevEvaluator(user, objective, dev, caches[1], config, folder) if dev is not None else None
    source: Callable[[int], Iterator[Batch]] = batches.steps_from
    trainer = Trainer(objective, source, config, folder, device=device, frozen=frozen, evaluate=evaluator)
    return trainer, batches, evaluator


def _workers(config: RunConfig) -> int:
    if config.data.workers is not None:
        return config.data.workers
    cores = torch.get_num_threads()
    return 0 if config.data.cache_features else max(1, min(cores - 1, 8))


def _describe(
    config: RunConfig,
    model: Stage1 | Stage2,
    data: Collection,
    dev: Collection | None,
    loaded: list[str],
    device: torch.device,
) -> None:
    fast = config.train.precision == "bf16" or (config.train.precision == "auto" and fast_bf16(device))
    _say(
        f"{config.recipe} ({config.stage}) on {device.type}, {distributed.world_size()} process(es), "
        f"{'bf16 autocast' if fast else 'fp32'}"
    )
    assert isinstance(model.vision, VisionEncoder)
    for row in parameter_table(model):
        state = " + ".join(
            f"{count / 1e6:.2f}M {word}"
            for count, word in ((row.trainable, "trained"), (row.frozen, "frozen"))
            if count
        )
        _say(f"  {row.name:<18} {state}")
    if model.vision.interpolated:
        _say(f"  image encoder: {model.vision.interpolated}")
    for line in loaded:
        _say(f"  {line}")
    _say(f"  train: {data.name}, {len(data.samples)} images" + _bad(data))
    for shard, reason in _lost_shards(data).items():
        _say(f"  left out {shard}: {reason}")
    if dev is not None:
        _say(f"  dev:   {dev.name}, {len(dev.samples)} images" + _bad(dev))
    else:
        _say("  dev:   none; --data.dev DATA measures while it trains")


def _lost_shards(collection: Collection) -> dict[str, str]:
    """Reason by address of the shards that a store did not give: such an entry is its own key."""
    return {bad.path: bad.reason for bad in collection.bad if bad.key == bad.path}


def _bad(collection: Collection) -> str:
    if not collection.bad:
        return ""
    reasons = Counter(b.reason for b in collection.bad)
    return f"; {len(collection.bad)} skipped: " + ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())


def _finish(
    config: RunConfig,
    folder: Path,
    model: nn.Module,
    outcome: Outcome,
    evaluator: DevEvaluator | None,
    batches: TrainingBatches,
    loaded: list[str],
    device: torch.device,
    first: int,
) -> None:
    """Write `summary.json` and `report.html`, and say where they are."""
    path = folder / "summary.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() and first else {}
    skipped = Counter(bad.reason for bad in [*batches.collection.bad, *batches.bad])
    summary = {
        "parameters": [
            {"name": row.name, "trainable": row.trainable, "frozen": row.frozen} for row in parameter_table(model)
        ],
        "seconds": before.get("seconds", 0.0) + outcome.seconds,
        "steps": outcome.step,
        "pairs": outcome.step * config.train.batch * config.data.texts_per_image,
        "hardware": _hardware(device),
        "versions": {"blip2": __version__, **{n: metadata.version(n) for n in ("torch", "transformers")}},
        "loaded": before.get("loaded") or loaded,
        "skipped": dict(skipped),
        "lost_shards": _lost_shards(batches.collection),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    beside = path.with_name(".summary.json.tmp")
    beside.write_text(json.dumps(summary, indent=1), "utf-8")
    beside.replace(path)
    for entry in evaluator.last_samples[:4] if evaluator is not None else []:
        _say(f"  {entry['key']}: {entry['caption']!r}  (reference: {entry['references'][0]!r})")
    for reason, count in skipped.items():
        _say(f"  skipped {count}: {reason}")
    report = write_report(folder)
    if outcome.interrupted is not None:
        name = signal.Signals(outcome.interrupted).name
        _say(f"stopped by {name} after step {outcome.step}, saved; go on with: blip2 train {folder}")
    else:
        _say(f"{outcome.step} steps done, {format_seconds(outcome.seconds)} in this call")
    _say(f"report: {report}")


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{distributed.world_size()} x {torch.cuda.get_device_name(device)}"
    return f"{torch.get_num_threads()} CPU threads x {distributed.world_size()} ({platform.machine()})"


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)
