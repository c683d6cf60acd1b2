"""Strict loading: every tensor has a place and every place a tensor, but for what a list names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip2.errors import CheckpointError
from blip2.models.freezing import is_adapter
from blip2.models.qformer.lora import stored_name
from blip2.weights.lazy_tensors import LazyTensor
from blip2.weights.names import listed

# Parts that are frozen in pretraining and come from their own checkpoint.
VISION = "vision."
FROZEN = (VISION, "language_model.")
# What stage 2 leaves behind of stage 1: the text branch, its head, and the heads of ITC and ITM.
TEXT_EMBEDDINGS, TEXT_FEED_FORWARD = "qformer.embeddings.", ".text_ff."
STAGE1_HEADS = ("qformer.head.", "vision_proj.", "text_proj.", "itm_head.", "temp")
STAGE1_ONLY = (TEXT_EMBEDDINGS, *STAGE1_HEADS)
# The frozen tower that may have adapters, which are all that is ever saved of it.
ADAPTED = ("language_model.",)
# So may the Q-Former; of it, adapters alone may start fresh.
QFORMER = "qformer."
# What stage 2 adds. The marks for the place of an image are new wherever a run adds them.
IMAGE_PLACES = "image_places"
STAGE2_ONLY = ("language_proj.", IMAGE_PLACES, *ADAPTED)
# Tensors of a row per word or per query: another number of rows is adapted where that is allowed.
_BY_ROWS = {
    "qformer.embeddings.word.weight": "words",
    "qformer.head.bias": "words",
    "qformer.query_tokens": "queries",
}
_WIDTHS = {
    "ln_vision.weight": (0, "an image encoder"),
    "cross_attention.key.weight": (1, "an image encoder"),
    "language_proj.weight": (0, "a language model"),
}


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `line()` is what a user reads."""

    source: str
    loaded: int
    left_out: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.loaded} tensors from {self.source}"]
        if self.left_out:
            parts.append(f"{len(self.left_out)} left out ({_prefixes(self.left_out)})")
        fresh = tuple(name for name in self.fresh if not name.startswith(VISION))
        if fresh:
            parts.append(f"{len(fresh)} start fresh ({_prefixes(fresh)})")
        if len(fresh) < len(self.fresh):  # an encoder that is about to train was loaded from its own checkpoint
            parts.append("image encoder as it was pretrained")
        return "; ".join([*parts, *self.reshaped])


@dataclass(frozen=True)
class Allowed:
    """What a load may do besides filling every tensor from one of its name and shape.

    Args:
        left_out: tensors of the checkpoint that the model has no place for.
        fresh: tensors of the model that keep their initialisation.
        adapt: whether another number of queries or of words (one more or less: [DEC]) is adapted.
    """

    left_out: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    adapt: bool = False


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a stage that is an adapter or not part of a frozen tower, by name.

    An image encoder that trains is saved whole.
    """
    vision = getattr(model, "vision", None)
    tuned = isinstance(vision, nn.Module) and any(p.requires_grad for p in vision.parameters())
    frozen = tuple(part for part in FROZEN if not (tuned and part == VISION))
    state = model.state_dict()
    return {stored_name(name): v for name, v in state.items() if is_adapter(name) or not name.startswith(frozen)}


def is_text_branch(name: str) -> bool:
    """Whether a tensor is of the Q-Former's text branch, its prediction head aside."""
    return name.startswith(TEXT_EMBEDDINGS) or TEXT_FEED_FORWARD in name


def new_adapters(state: Iterable[str]) -> tuple[str, ...]:
    """What may start fresh where a run goes on from a checkpoint: the adapters of a part that has none there."""
    adapters = list(filter(is_adapter, state))
    return tuple(part for part in (*ADAPTED, QFORMER) if not any(name.startswith(part) for name in adapters))


def fill(
    model: nn.Module, source: str, state: Mapping[str, Tensor | LazyTensor], allowed: Allowed | None = None
) -> LoadReport:
    """Fill what trains of a stage from tensors of our names, in place; on an error nothing is changed.

    Args:
        source: file or folder, for messages.

    Raises:
        CheckpointError: names the first missing, unexpected or differently shaped tensor.
    """
    own = trained_state(model)
    report = compare(own, source, state, allowed or Allowed())
    with torch.no_grad():
        for name, target in own.items():
            if name in state:
                _copy(target, state[name])
    return report


def compare(
    own: Mapping[str, Tensor], source: str, state: Mapping[str, Tensor | LazyTensor], allowed: Allowed
) -> LoadReport:
    """What filling a stage's tensors from a checkpoint's would do; reads names, shapes and types only.

    Raises:
        CheckpointError: as `fill`.
    """
    unexpected, missing = [n for n in state if n not in own], [n for n in own if n not in state]
    dropped = [n for n in unexpected if _droppable(n, allowed.left_out)]
    plain = tuple(entry for entry in allowed.fresh if entry != QFORMER)
    started = [n for n in missing if listed(n, allowed.fresh if is_adapter(n) else plain)]
    if len(missing) > len(started):
        name = next(n for n in missing if n not in started)
        cause = "has no LoRA adapter there" if is_adapter(name) else "is of another model or stage"
        raise CheckpointError(f"{source}: {name} is missing: the checkpoint {cause}")
    if len(unexpected) > len(dropped):
        name = next(n for n in unexpected if n not in dropped)
        cause = "give lora.rank and lora.targets of its run" if is_adapter(name) else "it is of another model or stage"
        raise CheckpointError(f"{source}: {name} has no place in this model: {cause}")
    shared = [name for name in own if name in state]
    reshaped = [line for name in shared if (line := _compare(source, name, state[name], own[name], allowed.adapt))]
    return LoadReport(source, len(shared), tuple(dropped), tuple(started), tuple(dict.fromkeys(reshaped)))


def _droppable(name: str, left_out: tuple[str, ...]) -> bool:
    return listed(name, left_out) or (TEXT_EMBEDDINGS in left_out and TEXT_FEED_FORWARD in name)


def _compare(source: str, name: str, theirs: Tensor | LazyTensor, ours: Tensor, adapt: bool) -> str | None:
    """None where the shapes are equal, a line where the difference is adapted, else an error."""
    have, want = tuple(theirs.shape), tuple(ours.shape)
    if not theirs.dtype.is_floating_point:
        raise CheckpointError(f"{source}: {name} is of type {str(theirs.dtype).removeprefix('torch.')}, not a float")
    if have == want:
        return None
    for part, (axis, what) in _WIDTHS.items():
        if name.endswith(part) and len(have) == len(want) and have[axis] != want[axis]:
            raise CheckpointError(f"{source}: made for {what} {have[axis]} wide, this model's is {want[axis]} wide")
    rows = _BY_ROWS.get(name)
    if adapt and rows and have[1:] == want[1:] and (rows == "queries" or abs(have[0] - want[0]) == 1):
        if have[0] > want[0]:
            return f"{have[0]} {rows} in the checkpoint, {want[0]} here: the first {want[0]} are used"
        return f"{have[0]} {rows} in the checkpoint, {want[0]} here: {want[0] - have[0]} start fresh"
    same = "lora.rank" if is_adapter(name) else "image encoder, Q-Former and number of queries"
    raise CheckpointError(f"{source}: {name} is {have} in the checkpoint and {want} in the model: use the same {same}")


def _copy(target: Tensor, source: Tensor | LazyTensor) -> None:
    value = source.read() if isinstance(source, LazyTensor) else source
    if value.shape == target.shape:
        target.copy_(value)
    else:
        rows = min(len(value), len(target))
        target[:rows].copy_(value[:rows])


def _prefixes(names: tuple[str, ...]) -> str:
    titles = {"qformer": "text branch", "language_model": "LoRA adapters"}
    parts = ("language_model" if is_adapter(name) else name.split(".")[0] for name in names)
    return ", ".join(dict.fromkeys(titles.get(part, part) for part in parts))
