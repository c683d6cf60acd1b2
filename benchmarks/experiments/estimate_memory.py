"""`blip2 estimate` against measured memory: one training step in a process of its own, features as the input.

Weights and texts are random, captions of natural length. Measured is the peak of three steps above what the process
held before the model was built: anonymous memory on a CPU, `torch.cuda.max_memory_allocated` on a GPU. Predicted is
the total of `blip2 estimate` without the image encoder, which a run on cached features does not need.

    python -m benchmarks.experiments.estimate_memory [--run tiny/stage1] [--batch 16] \
        [--set train.checkpoint=true] [--threads 1]

`--run paper` is the Q-Former of `vitg-opt2.7b/stage1`; without `--run` all of `RUNS` are measured. On a CPU what glibc
keeps of what is freed is part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.harness.common import ROOT, SIZES, captions
from benchmarks.harness.worker import forget_peak, peak_mb
from benchmarks.sides.ids import LanguageIds, QFormerIds
from blip2.configs import RunConfig, from_dict, to_dict
from blip2.data.batch import Batch
from blip2.estimate.measure import build_on_meta, measure
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.ops.devices import autocast, fast_dtype
from blip2.recipes import recipe
from blip2.training.objectives import build_objective
from blip2.training.optim import build_optimizer
from blip2.training.performance import apply_settings

TARGET = 0.15
# What is measured without `--run`, and the batch of each.
RUNS = {"tiny/stage1": 16, "tiny/stage2": 8, "paper": 4}
STEPS = 3  # the first makes gradients and the optimizer's state
PROMPT = "11 12 13"


def config_of(run: str, batch: int, settings: list[str], device: str) -> RunConfig:
    """The recipe on cached features with dotted settings over it (`train.checkpoint=true`)."""
    given = to_dict(recipe("vitg-opt2.7b/stage1" if run == "paper" else run))
    for name, value in [setting.split("=", 1) for setting in settings]:
        *path, last = name.split(".")
        place = given
        for part in path:
            place = place[part]
        place[last] = json.loads(value) if re.fullmatch(r"true|false|null|[-\d.e]+", value) else value
    config: RunConfig = from_dict(RunConfig, given)
    train = replace(config.train, batch=batch, accumulate=1, device=device)
    return replace(config, train=train, data=replace(config.data, cache_features=True))


def predicted_mb(config: RunConfig) -> float:
    """Total of `blip2 estimate` for the recipe's batch, without the image encoder's weights."""
    numbers = measure(config, accelerator=config.train.device != "cpu")
    total = next(row["total_gb"] for row in numbers["memory"] if row["batch"] == config.train.batch)
    encoder = next((part["frozen"] for part in numbers["parameters"] if part["part"] == "vision"), 0)
    megabytes: float = total * 1e3 - encoder * numbers["assumptions"]["bytes_per_frozen_parameter"] / 1e6
    return megabytes


class Step:
    """A training step of a run with random weights on random features: call it to take one.

    Attributes:
        before_mb: what this process, or its GPU, held before the model was built.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.device = config, torch.device(config.train.device)
        self.model = build_on_meta(config)
        features_BPC = _features(self.model, config)
        self.model.vision = None
        self.before_mb = _anonymous_mb() if self.device.type == "cpu" else torch.cuda.memory_allocated() / 1e6
        _fill(self.model, self.device)
        self.objective, self.batch = _objective(self.model, config), _batch(self.model, config, features_BPC)
        self.trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.trained, config.optim)

    def __call__(self) -> None:
        sent = self.batch.to(self.device)
        with autocast(self.device, self.config.train.precision):
            losses = self.objective(sent, 0)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in self.trained], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measured_mb(config: RunConfig) -> float:
    """Peak of `STEPS` steps above what this process held before the model was built."""
    step = Step(config)
    forget_peak(step.device.type)
    for _ in range(STEPS):
        step()
    return peak_mb(step.device.type) - step.before_mb


def _anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text("utf-8")
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.M)
    assert match is not None
    return int(match[1]) * 1024 / 1e6


def _fill(model: Stage1 | Stage2, device: torch.device) -> None:
    """Weights of the meta device become random numbers, in the dtypes of a run."""
    frozen = fast_dtype(device)
    if isinstance(model, Stage2):
        model.language_model.to(frozen)
    model.to_empty(device=device)
    if isinstance(model, Stage2):
        model.language_model.model.tie_weights()
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            if p.is_floating_point():
                p.normal_(std=0.02)
    if isinstance(model, Stage1):
        model.temp.data.fill_(0.07)


def _features(model: Stage1 | Stage2, config: RunConfig) -> torch.Tensor:
    vision: Any = model.vision
    return torch.randn(config.train.batch, vision.tokens, vision.width).to(torch.bfloat16)


def _objective(model: Stage1 | Stage2, config: RunConfig) -> nn.Module:
    apply_settings(model, config.train)
    words: Any = model.qformer.embeddings if isinstance(model, Stage1) else None
    texts = QFormerIds(words.word.num_embeddings - 1, config.qformer.max_text) if words is not None else None
    tokenizers: Any = SimpleNamespace(text_tokenizer=texts, language_tokenizer=LanguageIds(2, config.language.max_text))
    return build_objective(replace(config, language=replace(config.language, prompt=PROMPT)), model, tokenizers).train()


def _batch(model: Stage1 | Stage2, config: RunConfig, features_BPC: torch.Tensor) -> Batch:
    count = len(features_BPC)
    size = replace(SIZES["paper"], words=1000)
    texts = captions(count * config.data.texts_per_image, size)
    if isinstance(model, Stage2):  # a language model's captions have no marks but the end
        texts = [" ".join(text.split()[1:-1]) for text in texts]
    return Batch([str(n) for n in range(count)], torch.arange(count), texts, features=features_BPC)


def _child(arguments: list[str], threads: int) -> float:
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.experiments.estimate_memory", "--child", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["measured_mb"])


def main() -> None:
    """Print one JSON line a run: predicted, measured, and the share by which they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", choices=sorted(RUNS))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for run in [options.run] if options.run else list(RUNS):
        batch = options.batch or RUNS[run]
        config = config_of(run, batch, options.settings, options.device)
        if options.child:
            torch.set_num_threads(options.threads)
            print(json.dumps({"measured_mb": measured_mb(config)}), flush=True)
            continue
        shared = ["--run", run, "--batch", str(batch), "--threads", str(options.threads), "--device", options.device]
        measured = _child([*shared, *(f"--set={s}" for s in options.settings)], options.threads)
        predicted = predicted_mb(config)
        off = predicted / measured - 1
        record = {
            "claim": "blip2 estimate against measured peak memory",
            "target": TARGET,
            "run": run,
            "batch": batch,
            "settings": options.settings,
            "predicted_mb": round(predicted),
            "measured_mb": round(measured),
            "off": round(off, 3),
            "met": abs(off) <= TARGET,
            "device": options.device,
            "threads": options.threads,
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
