"""The training loop. It knows no loss: an objective maps a batch to named losses.

Plain `python` trains in one process; under `torchrun` the same code runs DDP, or FSDP2 by its setting.
Everything random in step N (data, augmentation, dropout, negatives) is seeded by (seed, N), so a resumed
run repeats, step for step, one that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from blip2.configs import RunConfig, to_dict
from blip2.data.batch import Batch
from blip2.errors import RunError
from blip2.models.freezing import assert_frozen, weights_digest
from blip2.models.vision.encoder import VisionEncoder
from blip2.ops import distributed
from blip2.ops.devices import autocast, to_list
from blip2.training import checkpoint
from blip2.training.optim import build_optimizer, learning_rate, set_learning_rate
from blip2.training.parallel import unsharded, unused_parameters, wrap
from blip2.training.run_log import RunLog
from blip2.weights import runs

Evaluate = Callable[[int], dict[str, Any]]


@dataclass
class Outcome:
    """How a run ended.

    Args:
        step: steps done in all.
        seconds: spent in this process's call.
        interrupted: the signal that stopped it (SIGINT, SIGTERM), or None.
    """

    step: int
    seconds: float
    interrupted: int | None = None


class Trainer:
    """Trains an objective over batches into a run folder, from its newest checkpoint on.

    Args:
        objective: module with `.model`; called as `objective(batch, step)`.
        batches: from a step number to the endless stream of this process's batches from there on.
        frozen: parts that must get no gradient and have the same weights at the end.
        evaluate: called with the number of steps done; returns numbers for the `dev` line, and
            under `captions` lines to show.
    """

    def __init__(
        self,
        objective: nn.Module,
        batches: Callable[[int], Iterator[Batch]],
        config: RunConfig,
        folder: Path,
        *,
        device: torch.device,
        frozen: list[nn.Module] | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        assert isinstance(objective.model, nn.Module)
        self.objective, self.model = objective, objective.model
        self.batches, self.evaluate, self.frozen = batches, evaluate, frozen or []
        depths = self._depths()
        self.wrapped = wrap(objective, config.train.parallel, device, unused_parameters(config))
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(trained, config.optim, depths)
        self.step = 0
        self._signal: int | None = None
        self._stopping = False
        self._best = runs.best_score(folder)

    def resume(self) -> int:
        """Go on from the newest whole checkpoint, if there is one; returns the steps done."""
        last = checkpoint.newest(self.folder)
        if last is not None:
            self.step = checkpoint.load(last, self.model, self.optimizer)
        return self.step

    def run(self) -> Outcome:
        """Train to the configured number of steps.

        Raises:
            RunError: non-finite loss (with the batch's keys), unwritable run folder.
            CheckpointError: a checkpoint cannot be written; earlier ones are intact.
        """
        began = time.monotonic()
        digests = [weights_digest(module) for module in self.frozen]
        log = None
        try:
            if distributed.rank() == 0:
                log = RunLog(self.folder, self.step, self.config.train.steps)
            with self._signals():
                if self.step == 0:
                    self._evaluate(log)
                self.objective.train()
                source = self.batches(self.step)
                while self.step < self.config.train.steps and not self._stopping:
                    self._one_step(source, log)
                    self._after_step(log)
        except OSError as error:
            where = error.filename or self.folder
            raise RunError(f"{where}: {error.strerror or error}; {self._intact()}") from error
        finally:
            if log is not None:
                log.close()
        if digests != [weights_digest(module) for module in self.frozen]:
            raise RunError("a frozen part changed during training")
        interrupted = (self._signal or signal.SIGTERM) if self._stopping else None
        return Outcome(self.step, time.monotonic() - began, interrupted)

    def _depths(self) -> dict[str, int]:
        """Depth of every parameter of an image encoder that trains; empty where it is frozen."""
        vision = getattr(self.model, "vision", None)
        if not isinstance(vision, VisionEncoder) or vision.frozen:
            return {}
        return {f"vision.model.{name}": depth for name, depth in vision.depths.items()}

    def _one_step(self, source: Iterator[Batch], log: RunLog | None) -> None:
        train, began = self.config.train, time.monotonic()
        batch = next(source)
        waited = time.monotonic() - began
        rate = learning_rate(self.step, train.steps, self.config.optim)
        set_learning_rate(self.optimizer, rate)
        torch.manual_seed(_seed(train.seed, self.step, distributed.rank()))
        losses = self._backward(batch)
        norm = self._clip()
        if not math.isfinite(norm):
            raise RunError(f"step {self.step + 1}: the gradient is not finite ({norm}); {self._advice(batch)}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.step == 0:
            for module in self.frozen:
                assert_frozen(module)
        self.step += 1
        seconds = time.monotonic() - began
        if log is not None:
            pairs = train.batch * self.config.data.texts_per_image
            speed = {"pairs_per_s": pairs / seconds, "data_wait": waited / seconds}
            log.write("train", self.step, {**losses, "lr": rate, "grad_norm": norm, **speed, "time": seconds})
            log.line.show(self.step, {**losses, **speed})

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Accumulate the gradients of a step's micro-batches; returns its losses, averaged over processes."""
        parts = self.config.train.accumulate
        total: dict[str, Tensor] = {}
        for number, micro in enumerate(batch.split(parts) if parts > 1 else [batch]):
            micro = micro.to(self.device)
            last = number == parts - 1
            with contextlib.nullcontext() if last else self._no_sync():
                with autocast(self.device, self.config.train.precision):
                    losses = self.wrapped(micro, self.step * parts + number)
                loss = torch.stack(list(losses.values())).sum()
                (loss / parts).backward()
            for name, value in losses.items():
                total[name] = total.get(name, torch.zeros((), device=self.device)) + value.detach() / parts
        signalled = torch.tensor(0.0 if self._signal is None else 1.0, device=self.device)
        means = to_list(distributed.mean_over_processes(torch.stack([*total.values(), signalled]).float()))
        values = dict(zip(total, means, strict=False))
        self._stopping = means[-1] > 0  # decided together: a signal to any process stops all
        if not all(math.isfinite(v) for v in values.values()):
            named = ", ".join(f"{k} {v}" for k, v in values.items())
            raise RunError(f"step {self.step + 1}: the loss is not finite ({named}); {self._advice(batch)}")
        return {"loss": sum(values.values()), **values}

    def _clip(self) -> float:
        limit = self.config.optim.clip
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, limit if limit is not None else math.inf)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _after_step(self, log: RunLog | None) -> None:
        train, last = self.config.train, self.step == self.config.train.steps
        if distributed.world_size() == 1:
            self._stopping = self._signal is not None
        if last or (self.step % train.eval_every == 0 and not self._stopping):
            self._evaluate(log)
        if last or self._stopping or self.step % train.save_every == 0:
            checkpoint.save(self.folder, self.step, self.model, self.optimizer, to_dict(self.config), train.keep)

    def _evaluate(self, log: RunLog | None) -> None:
        if self.evaluate is None:
            return
        self.objective.eval()
        precision = autocast(self.device, self.config.train.precision)
        with torch.no_grad(), unsharded(self.wrapped), distributed.single_process(), precision:
            numbers = self.evaluate(self.step)
        self.objective.train()
        captions = numbers.pop("captions", [])
        self._keep_best(numbers)
        if log is not None and numbers:
            log.write("dev", self.step, numbers)
            shown = "  ".join(f"{k} {v:.2f}" for k, v in numbers.items() if isinstance(v, float))
            log.line.say(f"dev at step {self.step}: {shown}")
            for caption in captions:
                log.line.say(f"  {caption}")

    def _keep_best(self, numbers: dict[str, Any]) -> None:
        """Save the weights when the dev number of `eval.best` is the best so far (highest; a loss: lowest)."""
        name = self.config.eval.best
        if name is None or name not in numbers:
            return
        score = -numbers[name] if name == "loss" else numbers[name]
        if self._best is None or score > self._best:
            checkpoint.save_best(self.folder, self.step, score, name, self.model, to_dict(self.config))
            self._best = score

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        no_sync = getattr(self.wrapped, "no_sync", None)
        return no_sync() if no_sync is not None else contextlib.nullcontext()

    def _advice(self, batch: Batch) -> str:
        return f"batch: {', '.join(batch.keys)}; lower optim.lr, or look at these samples; {self._intact()}"

    def _intact(self) -> str:
        last = checkpoint.newest(self.folder)
        return f"{last.name} is intact" if last else "no checkpoint had been written yet"

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """On Ctrl-C or SIGTERM finish the step, save and stop; on a second one stop at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number

        kinds = (signal.SIGINT, signal.SIGTERM)
        try:
            before = [signal.signal(kind, handle) for kind in kinds]
        except ValueError:  # not the main thread: the caller handles signals
            yield
            return
        try:
            yield
        finally:
            for kind, old in zip(kinds, before, strict=True):
                signal.signal(kind, old)


def _seed(seed: int, step: int, rank: int) -> int:
    """One 63-bit seed per (seed, step, process)."""
    mixed = (seed * 1_000_003 + step) * 1_000_033 + rank
    return mixed % (1 << 63)
