"""Our own weights: what trains, as safetensors with the run's configuration in the header.

Frozen towers are never saved: they come from their own checkpoints. LoRA adapters inside them
train and are. Loading is strict; what a hand-over may leave out is named in the lists below and
nowhere else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2.errors import CheckpointError
from blip2.models.freezing import is_adapter

# Parts that are frozen in pretraining and come from their own checkpoint.
FROZEN = ("vision.", "language_model.")
# What stage 2 leaves behind of stage 1: the text branch, its head, and the heads of ITC and ITM.
STAGE1_ONLY = (
    "qformer.embeddings.",
    "qformer.head.",
    "vision_proj.",
    "text_proj.",
    "itm_head.",
    "temp",
)
TEXT_FEED_FORWARD = ".text_ff."
# The frozen tower that may have adapters, which is all that is ever saved of it.
ADAPTED = ("language_model.",)
# What stage 2 adds.
STAGE2_ONLY = ("language_proj.", *ADAPTED)


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `line()` is what a user reads."""

    source: str
    loaded: int
    left_out: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.loaded} tensors from {self.source}"]
        if self.left_out:
            parts.append(f"{len(self.left_out)} left out ({_prefixes(self.left_out)})")
        if self.fresh:
            parts.append(f"{len(self.fresh)} start fresh ({_prefixes(self.fresh)})")
        return "; ".join(parts)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a stage that is an adapter or not part of a frozen tower, by name."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if is_adapter(name) or not name.startswith(FROZEN)}


def write_beside(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors beside `path`, flush to disk, and rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {_cause(error)}") from error


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: missing, truncated, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {_cause(error)}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Header metadata of a safetensors file; empty where it has none."""
    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {_cause(error)}") from error


def save_weights(path: Path, model: nn.Module, config: dict[str, object]) -> None:
    """Save what trains of a stage, with the run's configuration in the header."""
    write_beside(path, trained_state(model), {"format": "blip2", "config": json.dumps(config)})


def load_weights(model: nn.Module, path: Path, state: dict[str, Tensor] | None = None) -> LoadReport:
    """Load a checkpoint of the same stage, in place: every tensor must be there and fit.

    Raises:
        CheckpointError: names the first missing, unexpected or differently shaped tensor.
    """
    return _load(model, path, read(path) if state is None else state, left_out=(), fresh=())


def go_on_from(model: nn.Module, path: Path) -> LoadReport:
    """Start a run from a checkpoint of its own stage: as `load_weights`, but adapters may be new.

    Raises:
        CheckpointError: as `load_weights`; the checkpoint has some adapters, but not those of the model.
    """
    state = read(path)
    return _load(model, path, state, left_out=(), fresh=() if any(map(is_adapter, state)) else ADAPTED)


def hand_over(stage2: nn.Module, path: Path) -> LoadReport:
    """Start stage 2 from a stage-1 checkpoint: the text branch is left out, projection and adapters are new.

    Raises:
        CheckpointError: anything else is missing, left over, or of another shape.
    """
    state = read(path)
    if "temp" not in state:
        raise CheckpointError(f"{path}: not a stage-1 checkpoint (no ITC temperature): stage 2 starts from stage 1")
    return _load(stage2, path, state, left_out=STAGE1_ONLY, fresh=STAGE2_ONLY)


def _load(
    model: nn.Module, path: Path, state: dict[str, Tensor], left_out: tuple[str, ...], fresh: tuple[str, ...]
) -> LoadReport:
    own = trained_state(model)
    unexpected = [n for n in state if n not in own]
    missing = [n for n in own if n not in state]
    dropped = [n for n in unexpected if left_out and (_listed(n, left_out) or TEXT_FEED_FORWARD in n)]
    started = [n for n in missing if _listed(n, fresh)]
    if len(missing) > len(started):
        name = next(n for n in missing if n not in started)
        cause = "has no LoRA adapter there" if is_adapter(name) else "is of another model or stage"
        raise CheckpointError(f"{path}: {name} is missing: the checkpoint {cause}")
    if len(unexpected) > len(dropped):
        name = next(n for n in unexpected if n not in dropped)
        cause = "give lora.rank and lora.targets of its run" if is_adapter(name) else "it is of another model or stage"
        raise CheckpointError(f"{path}: {name} has no place in this model: {cause}")
    for name, value in own.items():
        if name in state and state[name].shape != value.shape:
            same = "lora.rank" if is_adapter(name) else "image encoder, Q-Former and number of queries"
            raise CheckpointError(
                f"{path}: {name} is {tuple(state[name].shape)} in the checkpoint and {tuple(value.shape)} in the "
                f"model: use the same {same}"
            )
    with torch.no_grad():
        for name, value in own.items():
            if name in state:
                value.copy_(state[name])
    return LoadReport(str(path), len(own) - len(started), tuple(dropped), tuple(started))


def _listed(name: str, allowed: tuple[str, ...]) -> bool:
    """Whether a list names this tensor, or (with a dot at the end) the part it is of."""
    return any(name.startswith(entry) if entry.endswith(".") else name == entry for entry in allowed)


def _prefixes(names: tuple[str, ...]) -> str:
    titles = {"qformer": "text branch", "language_model": "LoRA adapters"}
    return ", ".join(dict.fromkeys(titles.get(part, part) for part in (name.split(".")[0] for name in names)))


def _cause(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
