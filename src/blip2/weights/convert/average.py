"""`blip2 average`: the mean of runs' weights, as one run (model soups, arXiv 2203.05482).

Runs that began from the same weights lie close together; their mean often does better on dev than any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from blip2.errors import CheckpointError, ConfigError, os_error_as
from blip2.weights import runs
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.formats import open_checkpoint
from blip2.weights.lazy_tensors import LazyTensor


def average(sources: Sequence[str | Path], target: str | Path, weights: Sequence[float] | None = None) -> Path:
    """Write the weighted mean of runs of ours into a new run folder, tensor by tensor.

    Args:
        sources: two or more runs of one model; the configuration is the first one's.
        weights: how much each counts, relative to the others; None counts all alike.

    Returns:
        The folder.

    Raises:
        ConfigError: fewer than two runs, or weights that do not go with them.
        CheckpointError: not runs of ours, or not of one model; the target exists or cannot be written.
    """
    shares = _shares(len(sources), weights)
    target, checkpoints = Path(target), [open_checkpoint(source) for source in sources]
    _require_alike(checkpoints)
    runs.require_new(target)
    tensors = {name: _mean(name, checkpoints, shares) for name in checkpoints[0].tensors}
    with os_error_as(CheckpointError, f"{target}: cannot be written"):
        target.mkdir(parents=True, exist_ok=True)
        runs.write_run(target, tensors, replace(checkpoints[0].config, out=None))
    return target


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if count < 2:
        raise ConfigError(f"{count} run(s) to average: give two or more")
    given = list(weights) if weights else [1.0] * count
    if len(given) != count or min(given) < 0 or sum(given) <= 0:
        raise ConfigError(f"weights {given} for {count} runs: one for each, none below 0 and not all 0")
    return [weight / sum(given) for weight in given]


def _require_alike(checkpoints: list[Checkpoint]) -> None:
    first = checkpoints[0]
    for other in checkpoints:
        if other.format != "blip2":
            raise CheckpointError(f"{other.source}: not a run of ours: `blip2 convert --to blip2` makes it one")
        same = other.config.stage == first.config.stage and other.tensors.keys() == first.tensors.keys()
        if not same or any(other.tensors[n].shape != lazy.shape for n, lazy in first.tensors.items()):
            raise CheckpointError(f"{other.source}: not of the same model as {first.source}: they cannot be averaged")


def _mean(name: str, checkpoints: list[Checkpoint], shares: list[float]) -> LazyTensor:
    first = checkpoints[0].tensors[name]

    def read() -> Tensor:
        terms = [c.tensors[name].read().float() * share for c, share in zip(checkpoints, shares, strict=True)]
        return sum(terms[1:], terms[0]).to(first.dtype)

    return LazyTensor(first.shape, first.dtype, read)
