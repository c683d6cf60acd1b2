"""`blip2 train`: from a configuration to a run folder, resumed where one is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2.configs import RunConfig
from blip2.data.batch import Batch
from blip2.data.collection import Collection
from blip2.data.feature_cache import FeatureCache
from blip2.data.loader import TrainingBatches
from blip2.data.sources import open_collection
from blip2.inference import Blip2
from blip2.io.paths import cache_folder
from blip2.models.build import build, is_bert
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder
from blip2.ops import distributed
from blip2.ops.devices import autocast, pick_device
from blip2.training.initialise import claim, initialise, run_folder
from blip2.training.objectives import build_objective
from blip2.training.parallel import process_group, shards
from blip2.training.performance import apply_settings
from blip2.training.summary import describe, finish, say
from blip2.training.trainer import Trainer
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
    resumed = runs.checkpoints(folder)
    data = open_collection(config.data.train).limited(config.data.limit)
    dev = None
    if config.data.dev and config.eval.images:
        dev = open_collection(config.data.dev).limited(config.data.dev_limit).limited(config.eval.images)
    model = build(config, start=config.init is None or is_bert(config.qformer.init), device=device)
    loaded = [] if resumed else initialise(model, config)
    model.to(device)
    vision = model.vision
    assert isinstance(vision, VisionEncoder)
    describe(config, model, data, dev, loaded, device)
    with autocast(device, config.train.precision):
        caches = _caches(config, data, dev, vision, device)
    trainer, batches, evaluator = _assemble(config, folder, model, data, dev, caches, device)
    step = trainer.resume()
    if step:
        say(f"resuming {folder} after step {step}")
    if step >= config.train.steps:
        say(f"{folder} is complete: {step} steps done; raise --steps to go on")
        return 0
    outcome = trainer.run()
    if distributed.rank() == 0:
        finish(config, folder, model, outcome, evaluator, batches, loaded, device, step)
    return 0 if outcome.interrupted is None else 128 + outcome.interrupted


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
    user = Blip2(config, stage1=model) if isinstance(model, Stage1) else Blip2(config, stage2=model)
    objective = build_objective(config, model, user, sharded=shards(config.train.parallel))
    if isinstance(model, Stage2):
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
