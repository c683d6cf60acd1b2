"""Our own weights: what trains, as safetensors with the run's configuration in the header.

Frozen towers are never saved: they come from their own checkpoints. LoRA adapters inside them
train and are. Loading is strict; what a hand-over may leave out is named in the lists of
`blip2.weights.loading` and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2.errors import CheckpointError
from blip2.io.atomic import replacing
from blip2.weights.loading import STAGE1_ONLY, STAGE2_ONLY, Allowed, LoadReport, fill, trained_state

HAND_OVER = Allowed(left_out=STAGE1_ONLY, fresh=STAGE2_ONLY)


def write_beside(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file whole, and flush it to the disk."""
    try:
        with replacing(path, sync=True) as temporary:
            save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, metadata)
    except (OSError, SafetensorError) as error:
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
    return fill(model, str(path), read(path) if state is None else state)


def hand_over(stage2: nn.Module, path: Path) -> LoadReport:
    """Start stage 2 from a stage-1 checkpoint: the text branch is left out, projection and adapters are new.

    Raises:
        CheckpointError: anything else is missing, left over, or of another shape.
    """
    state = read(path)
    if "temp" not in state:
        raise CheckpointError(f"{path}: not a stage-1 checkpoint (no ITC temperature): stage 2 starts from stage 1")
    return fill(stage2, str(path), state, HAND_OVER)


def _cause(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
