"""`blip2 train`: from a configuration to a run folder, resumed where one is there."""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
from collections import Counter
from functools import partial
from importlib import metadata

import torch
from torch import Tensor, nn

from blip2 import __version__
from blip2.configs import RunConfig
from blip2.data.collection import Collection
from blip2.data.feature_cache import FeatureCache
from blip2.data.loader import TrainingBatches, require_single_images
from blip2.data.sources import open_collection
from blip2.inference import Blip2
from blip2.io.atomic import write_json
from blip2.io.paths import cache_folder
from blip2.models.build import build, is_bert
from blip2.models.freezing import parameter_table
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.ops import distributed
from blip2.ops.devices import autocast, pick_device, uses_bf16
from blip2.training.initialise import claim, initialise, run_folder
from blip2.training.objectives import build_objective
from blip2.training.parallel import process_group, shards
from blip2.training.performance import apply_settings
from blip2.training.report import write_report
from blip2.training.run_log import format_seconds
from blip2.training.trainer import Outcome, Trainer
from blip2.training.validation import DevEvaluator
from blip2.weights import runs


def train(config: RunConfig) -> int:
    """Run a configuration to its end, or resume the run in its folder.

    Returns:
        Exit code: 0 done, 130 after Ctrl-C, 143 after SIGTERM; both saved.
    """
    device = pick_device(config.train.device, "train.device")
    with process_group(device):
        return _train(config, device)


def _train(config: RunConfig, device: torch.device) -> int:
    folder = run_folder(config)
    if distributed.rank() == 0:
        claim(folder, config)
    distributed.barrier()
    resumed = bool(runs.checkpoints(folder))
    data, dev = open_collection(config.data.train).limited(config.data.limit), None
    if config.data.dev and config.eval.images:
        dev = open_collection(config.data.dev).limited(config.data.dev_limit).limited(config.eval.images)
    model = build(config, start=config.init is None or is_bert(config.qformer.init), device=device)
    loaded = [] if resumed else initialise(model, config)
    model.to(device)
    user = Blip2(config, stage1=model) if isinstance(model, Stage1) else Blip2(config, stage2=model)
    bf16 = "bf16 autocast" if uses_bf16(device, config.train.precision) else "fp32"
    _say(f"{config.recipe} ({config.stage}) on {device.type}, {distributed.world_size()} process(es), {bf16}")
    _describe(user, model, loaded, data, dev)
    with autocast(device, config.train.precision):
        features, dev_features = _feature_caches(user, data, dev)
    apply_settings(model, config.train)
    objective = build_objective(config, model, user, sharded=shards(config.train.parallel))
    batches = TrainingBatches(
        data,
        batch=config.train.batch,
        seed=config.train.seed,
        spec=user.image_spec,
        features=features,
        augment=config.data.augment,
        crop_min=config.data.crop_min,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=_workers(config),
        texts=config.data.texts,
        texts_per_image=config.data.texts_per_image,
        clean=config.data.clean,
    )
    evaluator = DevEvaluator(user, objective, dev, dev_features, folder) if dev is not None else None
    frozen: list[nn.Module] = [user.vision] if user.vision.frozen else []
    if isinstance(model, Stage2):
        frozen.append(model.language_model)
    trainer = Trainer(objective, batches.steps_from, config, folder, device=device, frozen=frozen, evaluate=evaluator)
    step = trainer.resume()
    if step:
        _say(f"resuming {folder} after step {step}")
    if step >= config.train.steps:
        _say(f"{folder} is complete: {step} steps done; raise --steps to go on")
        return 0
    outcome = trainer.run()
    if distributed.rank() == 0:
        for entry in evaluator.last_samples[:4] if evaluator is not None else []:
            _say(f"  {entry['key']}: {entry['caption']!r}  (reference: {entry['references'][0]!r})")
        _write_summary(trainer, batches, loaded, outcome, continued=bool(step))
        report = write_report(folder)
        if outcome.interrupted is not None:
            name = signal.Signals(outcome.interrupted).name
            _say(f"stopped by {name} after step {outcome.step}, saved; go on with: blip2 train {folder}")
        else:
            _say(f"{outcome.step} steps done, {format_seconds(outcome.seconds)} in this call")
        _say(f"report: {report}")
    return 0 if outcome.interrupted is None else 128 + outcome.interrupted


def _say(text: str) -> None:
    """A line in the terminal, from the first process alone."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _describe(user: Blip2, model: nn.Module, loaded: list[str], data: Collection, dev: Collection | None) -> None:
    """Say what is about to run: what trains, what was loaded, what is learned from."""
    for row in parameter_table(model):
        counts = {"trained": row.trainable, "frozen": row.frozen}
        _say(f"  {row.name:<18} " + " + ".join(f"{n / 1e6:.2f}M {word}" for word, n in counts.items() if n))
    if user.vision.interpolated:
        _say(f"  image encoder: {user.vision.interpolated}")
    for line in loaded:
        _say(f"  {line}")
    _say(f"  train: {_images(data)}")
    for shard, reason in _lost_shards(data).items():
        _say(f"  left out {shard}: {reason}")
    _say(f"  dev:   {_images(dev) if dev is not None else 'none; --data.dev DATA measures while it trains'}")


def _images(collection: Collection) -> str:
    """The name of a data set, its number of images and why others were skipped."""
    reasons = Counter(bad.reason for bad in collection.bad).most_common()
    skipped = f"; {len(collection.bad)} skipped: " + ", ".join(f"{n} {reason}" for reason, n in reasons)
    note = f"; {collection.note}" if collection.note else ""
    return f"{collection.name}, {len(collection.samples)} images" + (skipped if reasons else "") + note


def _lost_shards(collection: Collection) -> dict[str, str]:
    """Reason by address of the shards that a store did not give: such an entry is its own key."""
    return {bad.path: bad.reason for bad in collection.bad if bad.key == bad.path}


def _feature_caches(
    user: Blip2, data: Collection, dev: Collection | None
) -> tuple[FeatureCache | None, FeatureCache | None]:
    """Feature caches of train and dev; one process builds, the others wait at its lock and open."""
    config = user.config
    if config.data.cache_features or config.stage == "stage1":
        for collection in filter(None, (data, dev)):
            require_single_images(collection)
    if not config.data.cache_features:
        return None, None

    def encode(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return user.vision(pixels.to(user.device))

    open_cache = partial(
        FeatureCache.open_or_build,
        cache_folder() / "features",
        spec=user.image_spec,
        encoder_id=user.vision.id,
        encode=encode,
        crop_min=config.data.crop_min,
        seed=config.train.seed,
        rank=distributed.rank(),
    )
    return open_cache(data, views=config.data.cache_views), open_cache(dev, views=1) if dev is not None else None


def _workers(config: RunConfig) -> int:
    if config.data.workers is not None:
        return config.data.workers
    return 0 if config.data.cache_features else max(1, min(torch.get_num_threads() - 1, 8))


def _write_summary(
    trainer: Trainer, batches: TrainingBatches, loaded: list[str], outcome: Outcome, *, continued: bool
) -> None:
    """Write `summary.json` and say what was skipped; time and weights of earlier calls count in a continued run."""
    path, config = trainer.folder / "summary.json", trainer.config
    before = json.loads(path.read_text("utf-8")) if path.exists() and continued else {}
    skipped = Counter(sample.reason for sample in [*batches.collection.bad, *batches.bad])
    summary = {
        "parameters": [vars(row) for row in parameter_table(trainer.model)],
        "seconds": before.get("seconds", 0.0) + outcome.seconds,
        "steps": outcome.step,
        "pairs": outcome.step * config.train.batch * config.data.texts_per_image,
        "hardware": _hardware(trainer.device),
        "versions": {"blip2": __version__, **{n: metadata.version(n) for n in ("torch", "transformers")}},
        "loaded": before.get("loaded") or loaded,
        "skipped": dict(skipped),
        "lost_shards": _lost_shards(batches.collection),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_json(path, summary)
    for reason, count in skipped.items():
        _say(f"  skipped {count}: {reason}")


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{distributed.world_size()} x {torch.cuda.get_device_name(device)}"
    threads, processes = torch.get_num_threads(), distributed.world_size()
    text = f"{threads} CPU thread{'s' * (threads > 1)} ({platform.machine()})"
    return f"{processes} processes of {text}" if processes > 1 else text
