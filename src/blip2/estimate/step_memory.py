"""The most memory that a training step holds: forward and backward pass on the meta device, byte by byte.

Autograd does here what it does in a real step: it frees what it no longer needs, adds gradients as
they come, and computes checkpointed layers and chunks of the output head again. Only the weights,
which are there before, and the optimizer are left to `blip2.estimate.measure`.

Shape letters: B batch, N texts, T text tokens, S side of an image, P patches, C channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip2.configs import RunConfig
from blip2.estimate.activations import (
    LONGEST_TEXT,
    PROMPT_TOKENS,
    TEXT_TOKENS,
    DeviceKernels,
    Machine,
    _stage1_losses,
    _stage2_loss,
)
from blip2.models.freezing import is_adapter
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder
from blip2.training.objectives.common import drop_tokens
from blip2.training.objectives.stage2 import piece_count

# Tokens that the texts of the largest of so many pieces of a batch have more than all: pieces are sorted by the
# longest text about an image (natural captions, one an image; with several of them images differ less).
LONGER_BY = {1: 0.0, 2: 2.4, 3: 3.7, 4: 4.3}
# Sizes of the micro-batch that are counted: enough for long texts to stand apart from short ones on a CPU.
COUNTED = (16, 17, 18)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live, after every operation, on any device.

    Counts storages, and only those made while it is on.

    Args:
        module: its parameters and buffers, which are there already, do not count.

    Attributes:
        timeline: bytes after each operation.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.timeline: list[int] = []
        self._now = 0
        self._before = [t.untyped_storage() for t in chain(module.parameters(), module.buffers())]
        self._known: dict[int, Any] = {storage._cdata: storage for storage in self._before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage())
        self.timeline.append(self._now)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return

        def gone(_: Any) -> None:
            self._now -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, gone)
        self._now += size


def step_timeline(
    model: Stage1 | Stage2,
    config: RunConfig,
    batch: int,
    machine: Machine,
    *,
    text_tokens: int | None = None,
    longest: int | None = None,
    pieces: int | None = None,
) -> list[int]:
    """Bytes beside the weights and the optimizer's state, after each operation of a micro-batch's step.

    Args:
        model: on the meta device, in train mode.
        text_tokens: real tokens of all texts but one; None takes natural captions (`TEXT_TOKENS`), in
            stage 2 behind the prompt and with one mark, not two, and longer in the largest piece (`LONGER_BY`).
        longest: of that one.
        pieces: that the language model reads one after the other in stage 2; None as a run of this batch.
    """
    _prepare(model, config, machine)
    live = LiveBytes(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    more = PROMPT_TOKENS - 1 if config.stage == "stage2" else 0
    sizes = text_tokens or TEXT_TOKENS + more, longest or LONGEST_TEXT + more
    ids_NT, mask_NT = _texts(batch * config.data.texts_per_image, *sizes)
    with live, DeviceKernels(machine) as kernels:
        if config.train.accumulate > 1:
            for p in trained:
                p.grad = torch.empty_like(p)
        seen_BPC = _features(model, config, batch, machine)
        if isinstance(model, Stage2):
            pieces = pieces or language_pieces(config, batch, machine, int(mask_NT.sum()))
            if text_tokens is None and _in_pieces(config):
                mask_NT = _sorted(mask_NT, batch, pieces)
            loss = _stage2_loss(model, seen_BPC, ids_NT, mask_NT, pieces if _in_pieces(config) else None)
        else:
            ids_BT, early = ids_NT.to("meta"), config.train.early_backward
            loss = torch.stack(_stage1_losses(model, config.loss, seen_BPC, ids_BT, mask_NT, early)).sum()
        kernels.end_forward()
        torch.autograd.backward(loss)
    for p in trained:
        p.grad = None
    return live.timeline


def _in_pieces(config: RunConfig) -> bool:
    """Whether the language model reads a batch in pieces; a sequence of several pairs stays whole."""
    return config.train.early_backward and not config.data.shots


def language_pieces(config: RunConfig, batch: int, machine: Machine, text_tokens: int) -> int:
    """How many pieces of a stage-2 batch are run backward by themselves, as `Stage2Objective` decides it."""
    images = batch * (config.data.texts_per_image if config.qformer.question else 1)
    return piece_count(images, images * config.qformer.queries + text_tokens, cpu=not machine.accelerator)


def step_curve(model: Stage1 | Stage2, config: RunConfig, machine: Machine) -> Callable[[int], int]:
    """Most bytes beside the weights and the optimizer's state, as a function of the micro-batch.

    In stage 2 a batch that is run in another number of pieces is another line.
    """
    if config.stage == "stage1" or not _in_pieces(config):
        return _curve(model, config, machine, 1)
    curves: dict[int, Callable[[int], int]] = {}
    more = TEXT_TOKENS + PROMPT_TOKENS - 1

    def peak(batch: int) -> int:
        pieces = language_pieces(config, batch, machine, batch * config.data.texts_per_image * more)
        if batch % pieces and batch < pieces * COUNTED[0]:  # one image more in a piece is much of it
            return max(step_timeline(model, config, batch, machine, pieces=pieces))
        if pieces not in curves:
            curves[pieces] = _curve(model, config, machine, pieces)
        return curves[pieces](batch)

    return peak


def _curve(model: Stage1 | Stage2, config: RunConfig, machine: Machine, pieces: int) -> Callable[[int], int]:
    """`step_curve` of batches that are run in `pieces`, counted where each piece is as large.

    Three counts give it: at every moment of a step bytes grow linearly with the batch, but for ITC's
    similarities in stage 1, which grow with its square (two counts do for stage 2). With
    `train.head_chunk`, where a larger batch takes more operations, two counts large enough for
    several chunks give a line.
    """
    if config.train.head_chunk is not None:
        low = pieces * max(2 * COUNTED[0], -(-2 * config.train.head_chunk // TEXT_TOKENS))
        at_low, at_high = (max(step_timeline(model, config, n, machine, pieces=pieces)) for n in (low, 2 * low))
        return lambda batch: max(0, at_low + (at_high - at_low) * (batch - low) // low)
    counted = [pieces * n for n in (COUNTED if config.stage == "stage1" else COUNTED[:2])]
    found = [np.array(step_timeline(model, config, n, machine, pieces=pieces), dtype=np.int64) for n in counted]
    start, slope = found[0], found[1] - found[0]
    bend = found[2] - 2 * found[1] + found[0] if len(found) > 2 else np.zeros_like(start)

    def peak(batch: int) -> int:
        more = (batch - counted[0]) / pieces
        return int((start + more * slope + more * (more - 1) / 2 * bend).max())

    return peak


def _prepare(model: Stage1 | Stage2, config: RunConfig, machine: Machine) -> None:
    """Dtypes of the frozen models, and the settings that change what is kept."""
    assert isinstance(model.vision, VisionEncoder)
    if model.vision.frozen:
        model.vision.to(machine.frozen)
    if isinstance(model.qformer, QFormer):
        model.qformer.gradient_checkpointing = config.train.checkpoint
        model.qformer.head_chunk = config.train.head_chunk
    if isinstance(model, Stage2):
        language = model.language_model
        language.to(machine.frozen)
        for name, p in language.named_parameters():
            if is_adapter(name):
                p.data = p.data.float()
        language.gradient_checkpointing = config.train.checkpoint
        language.chunk_head(config.train.head_chunk)
        language.split_lengths = not machine.accelerator


def _texts(count: int, tokens: int, longest: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts that begin alike, on the CPU: what depends on their values is read from them."""
    ids_NT = torch.arange(count)[:, None].repeat(1, longest)
    ids_NT[:, :PROMPT_TOKENS] = 0
    lengths_N = torch.full((count,), tokens)
    lengths_N[0] = longest
    return ids_NT, torch.arange(longest)[None] < lengths_N[:, None]


def _sorted(mask_NT: Tensor, images: int, pieces: int) -> Tensor:
    """The mask, with longer texts about as many images as the largest piece has."""
    more = round(LONGER_BY[pieces] / (len(mask_NT) / images) ** (2 / 3))
    lengths_N = mask_NT.sum(1)
    long_N = torch.arange(len(mask_NT)) % images < images // pieces
    lengths_N = torch.where(long_N, lengths_N + more, lengths_N).clamp(max=mask_NT.shape[1])
    return torch.arange(mask_NT.shape[1])[None] < lengths_N[:, None]


def _features(model: Stage1 | Stage2, config: RunConfig, batch: int, machine: Machine) -> Tensor:
    """What the Q-Former is given, made as in a run: read from a cache, or encoded from pixels."""
    vision = model.vision
    assert isinstance(vision, VisionEncoder)
    if config.data.cache_features:
        features_BPC = torch.empty(batch, vision.tokens, vision.width, device="meta", dtype=torch.bfloat16)
    else:
        features_BPC = model.features(torch.empty(batch, 3, vision.size, vision.size, device="meta"))
    if not config.vision.token_drop:
        return features_BPC
    return drop_tokens(features_BPC, config.vision.token_drop, vision.prefix)
