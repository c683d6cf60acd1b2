"""What a run says of itself: in the terminal as it starts and ends, and in `summary.json`."""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from blip2 import __version__
from blip2.configs import RunConfig
from blip2.data.collection import Collection
from blip2.data.loader import TrainingBatches
from blip2.io.atomic import write_json
from blip2.models.freezing import parameter_table
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder
from blip2.ops import distributed
from blip2.ops.devices import uses_bf16
from blip2.training.report import write_report
from blip2.training.run_log import format_seconds
from blip2.training.trainer import Outcome
from blip2.training.validation import DevEvaluator


def say(text: str) -> None:
    """A line in the terminal, from the first process alone."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def describe(
    config: RunConfig,
    model: Stage1 | Stage2,
    data: Collection,
    dev: Collection | None,
    loaded: list[str],
    device: torch.device,
) -> None:
    """Say what is about to run: device and precision, what trains, what was loaded, what is learned from."""
    say(
        f"{config.recipe} ({config.stage}) on {device.type}, {distributed.world_size()} process(es), "
        f"{'bf16 autocast' if uses_bf16(device, config.train.precision) else 'fp32'}"
    )
    assert isinstance(model.vision, VisionEncoder)
    for row in parameter_table(model):
        state = " + ".join(
            f"{count / 1e6:.2f}M {word}"
            for count, word in ((row.trainable, "trained"), (row.frozen, "frozen"))
            if count
        )
        say(f"  {row.name:<18} {state}")
    if model.vision.interpolated:
        say(f"  image encoder: {model.vision.interpolated}")
    for line in loaded:
        say(f"  {line}")
    say(f"  train: {data.name}, {len(data.samples)} images" + _bad(data))
    for shard, reason in _lost_shards(data).items():
        say(f"  left out {shard}: {reason}")
    if dev is not None:
        say(f"  dev:   {dev.name}, {len(dev.samples)} images" + _bad(dev))
    else:
        say("  dev:   none; --data.dev DATA measures while it trains")


def _lost_shards(collection: Collection) -> dict[str, str]:
    """Reason by address of the shards that a store did not give: such an entry is its own key."""
    return {bad.path: bad.reason for bad in collection.bad if bad.key == bad.path}


def _bad(collection: Collection) -> str:
    if not collection.bad:
        return ""
    reasons = Counter(b.reason for b in collection.bad)
    return f"; {len(collection.bad)} skipped: " + ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())


def finish(
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
    write_json(path, summary)
    for entry in evaluator.last_samples[:4] if evaluator is not None else []:
        say(f"  {entry['key']}: {entry['caption']!r}  (reference: {entry['references'][0]!r})")
    for reason, count in skipped.items():
        say(f"  skipped {count}: {reason}")
    report = write_report(folder)
    if outcome.interrupted is not None:
        name = signal.Signals(outcome.interrupted).name
        say(f"stopped by {name} after step {outcome.step}, saved; go on with: blip2 train {folder}")
    else:
        say(f"{outcome.step} steps done, {format_seconds(outcome.seconds)} in this call")
    say(f"report: {report}")


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{distributed.world_size()} x {torch.cuda.get_device_name(device)}"
    return f"{torch.get_num_threads()} CPU threads x {distributed.world_size()} ({platform.machine()})"
