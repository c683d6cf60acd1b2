"""Checkpoints of a run: `checkpoints/step-000100/` with weights, optimizer state and the step.

Data order, augmentation, dropout and negatives are functions of (seed, step), so the step number alone
says where to go on in all of them. A checkpoint is written under another name and then renamed, so one
that exists is complete. Tensors are safetensors, the rest is JSON; nothing is pickled. Under FSDP2 all
processes gather the tensors and the first one writes them: the files do not depend on the number of processes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from blip2.errors import CheckpointError
from blip2.io.atomic import replacing
from blip2.ops import distributed
from blip2.weights import runs
from blip2.weights.lazy_tensors import lazily, read_safetensors, write_safetensors
from blip2.weights.loading import fill, trained_state

MODEL, OPTIMIZER, STATE = runs.WEIGHTS, "optimizer.safetensors", "state.json"


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    checkpoints = runs.checkpoints(run)
    return checkpoints[-1][1] if checkpoints else None


def save(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of a run after `step` steps, and delete all but the newest `keep`.

    Raises:
        CheckpointError: full disk, read-only folder; earlier checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step-{step:06d}"
    weights = _gathered(trained_state(model))
    moments = _gathered(_moments(model, optimizer))
    if distributed.rank() == 0:
        _write(target, weights, moments, config, {STATE: {"step": step}})
        _prune(run, keep)
    return target


def save_best(run: Path, step: int, score: float, name: str, model: nn.Module, config: dict[str, Any]) -> None:
    """Write weights as the run's best: `best/`, in place of an earlier best.

    Args:
        score: on dev, higher is better; `name` of the number.

    Raises:
        CheckpointError: as `save`.
    """
    weights = _gathered(trained_state(model))
    if distributed.rank() == 0:
        state = {"step": step, "metric": name, "score": score}
        _write(run / runs.BEST, weights, None, config, {runs.SCORE: state})


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and optimizer state in place; returns the number of steps done.

    Raises:
        CheckpointError: a file is damaged or of another model.
    """
    step = _read_step(folder)
    state, own = read_safetensors(folder / MODEL), trained_state(model)
    sharded = {n: value for n, value in own.items() if isinstance(value, DTensor) and n in state}
    fill(model, str(folder / MODEL), state | {n: _as(state[n], value) for n, value in sharded.items()})
    _restore_moments(model, optimizer, read_safetensors(folder / OPTIMIZER), folder / OPTIMIZER)
    return step


def _write(
    target: Path,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor] | None,
    config: dict[str, Any],
    states: dict[str, dict[str, Any]],
) -> None:
    """Write a folder with weights, optimizer state and JSON files; on an error there is none."""
    try:
        with replacing(target, sync=True) as temporary:
            temporary.mkdir(parents=True)
            runs.write_weights(temporary / MODEL, lazily(weights), config)
            if moments is not None:
                write_safetensors(temporary / OPTIMIZER, lazily(moments))
            for name, state in states.items():
                (temporary / name).write_text(json.dumps(state))
            if target.exists():
                shutil.rmtree(target)
    except (OSError, CheckpointError) as error:
        last = newest(target.parent if target.name == runs.BEST else target.parents[1])
        intact = f"; {last.name} is intact" if last else ""
        cause = getattr(error, "strerror", None) or str(error).rsplit(": ", 1)[-1]
        raise CheckpointError(f"{target}: cannot write the checkpoint: {cause}{intact}") from error


def _prune(run: Path, keep: int) -> None:
    for _, path in runs.checkpoints(run)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in (run / "checkpoints").glob(".step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _read_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / STATE).read_text())["step"])
    except OSError as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE}: damaged, it does not say the step") from error


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, flat: `exp_avg.NAME`; in 8 bits `exp_avg:codes.NAME` and `exp_avg:scale.NAME`."""
    flat: dict[str, Tensor] = {}
    for name, p in _trained(model).items():
        for kind, value in optimizer.state.get(p, {}).items():
            if hasattr(value, "codes"):
                flat |= {f"{kind}:{part}.{name}": getattr(value, part) for part in ("codes", "scale")}
            else:
                flat[f"{kind}.{name}"] = value
    return flat


def _restore_moments(model: nn.Module, optimizer: Any, flat: dict[str, Tensor], source: Path) -> None:
    named = _trained(model)
    for key, value in flat.items():
        kind, name = key.split(".", 1)
        if name not in named:
            raise CheckpointError(f"{source}: {key} is of a tensor that does not train in this model")
        parameter = named[name]
        if kind == "step":
            optimizer.state[parameter][kind] = value.to(parameter.device)
        elif ":" in kind:
            kind, part = kind.split(":")
            state = optimizer.state[parameter]
            if kind not in state:  # as torchao does in the first step
                state[kind] = optimizer._new_buffer(parameter, kind == "exp_avg")
            getattr(state[kind], part).copy_(value)
        else:
            optimizer.state[parameter][kind] = _as(value, parameter).to(parameter.dtype)


def _gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unsharded tensors on the CPU of the first process; the others take part in gathering and keep nothing."""
    gathered: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if distributed.rank() == 0:
            gathered[name] = tensor.detach().to("cpu")
    return gathered


def _as(value: Tensor, like: Tensor) -> Tensor:
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
