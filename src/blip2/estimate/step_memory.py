"""The most memory that a training step holds: forward and backward pass on the meta device, byte by byte.

What is run is the objective of `blip2 train` itself. Autograd does here what it does in a real step: it frees
what it no longer needs, adds gradients as they come, and computes checkpointed layers and chunks of the output
head again. Only the weights, which are there before, and the optimizer are left to `blip2.estimate.measure`.

Shape letters: N texts, T text tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip2.configs import RunConfig
from blip2.data.batch import Batch
from blip2.data.tokenizers import InstructionReader
from blip2.estimate.kernels import DeviceKernels, Machine
from blip2.models.freezing import is_adapter
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder
from blip2.training.objectives import build_objective
from blip2.training.objectives.common import EarlyBackward
from blip2.training.objectives.stage2 import Stage2Objective, piece_count
from blip2.training.performance import apply_settings

# A caption with its special tokens: the mean of natural ones, and the longest of a batch.
TEXT_TOKENS, LONGEST_TEXT = 12, 20
# "a photo of": in front of the caption in stage 2, and not predicted.
PROMPT_TOKENS = 3
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
    prompt = PROMPT_TOKENS - 1 if config.stage == "stage2" else 0
    lengths_N = torch.full((batch * config.data.texts_per_image,), text_tokens or TEXT_TOKENS + prompt)
    longest = longest or LONGEST_TEXT + prompt
    lengths_N[0] = longest
    pieces = pieces or language_pieces(config, batch, machine, int(lengths_N.sum()))
    if text_tokens is None and config.stage == "stage2" and _in_pieces(config):
        lengths_N = _longer_first(lengths_N, batch, pieces, longest)
    with live:
        run_step(model, config, lengths_N, DeviceKernels(machine), pieces)
    return live.timeline


def run_step(
    model: Stage1 | Stage2, config: RunConfig, lengths_N: Tensor, kernels: DeviceKernels, pieces: int | None = None
) -> None:
    """Forward and backward pass of one micro-batch of a run, on the meta device; gradients are dropped again.

    Args:
        lengths_N: tokens of its texts, `data.texts_per_image` for each image.
        pieces: see `step_timeline`.
    """
    objective = _objective(model, config, FixedLengths(lengths_N, config.qformer.instruction), pieces)
    trained = [p for p in model.parameters() if p.requires_grad]
    with kernels:
        if config.train.accumulate > 1:
            for p in trained:
                p.grad = torch.empty_like(p)
        losses = objective(_batch(model, config, len(lengths_N) // config.data.texts_per_image), 0)
        kernels.end_forward()
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
    for p in trained:
        p.grad = None


class FixedLengths:
    """In place of a tokenizer: texts of given lengths, whatever they say, that begin alike."""

    pad_id = dec_id = front = 0

    def __init__(self, lengths_N: Tensor, reads: str | None = None) -> None:
        self.lengths_N = lengths_N
        self.text_tokenizer = self.language_tokenizer = self
        texts: Any = self
        self.instruction_reader = None if reads is None else InstructionReader(texts, reads)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids [N, T] and mask [N, T]."""
        lengths_N = self.lengths_N[: len(texts)]
        ids_NT = torch.arange(len(texts))[:, None].repeat(1, int(self.lengths_N.max()))
        ids_NT[:, :PROMPT_TOKENS] = 0
        return ids_NT, torch.arange(ids_NT.shape[1]) < lengths_N[:, None]

    def targets(self, prompts: list[str], captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels [N, T]: all but the prompt is predicted."""
        ids_NT, mask_NT = self(captions)
        labels_NT = mask_NT.clone()
        labels_NT[:, :PROMPT_TOKENS] = False
        return ids_NT, mask_NT, labels_NT

    def pairs(self, prefixes: list[str], suffixes: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and mask on both sides of an encoder-decoder, each as long as a whole text."""
        return *self(prefixes), *self(suffixes)


def _objective(model: Stage1 | Stage2, config: RunConfig, texts: Any, pieces: int | None) -> nn.Module:
    """The run's own objective on texts of fixed lengths."""
    objective = build_objective(config, model, texts)
    inner = objective.objective if isinstance(objective, EarlyBackward) else objective
    if isinstance(inner, Stage2Objective):
        # the first piece is the largest and the second meets its gradients: what comes after them adds nothing
        inner.pieces, parts = pieces, inner.parts
        inner.parts = lambda *arguments: islice(parts(*arguments), 2)  # type: ignore[method-assign]
    return objective


def _batch(model: Stage1 | Stage2, config: RunConfig, size: int) -> Batch:
    """A batch on the meta device: image features from a cache, or pixels to encode."""
    vision, captions = model.vision, ["a caption"] * (size * config.data.texts_per_image)
    assert isinstance(vision, VisionEncoder)
    with torch.device("meta"):
        return Batch(
            [""] * size,
            torch.empty(size, dtype=torch.int64),
            captions,
            pixels=None if config.data.cache_features else torch.empty(size, 3, vision.size, vision.size),
            features=torch.empty(size, vision.tokens, vision.width, dtype=torch.bfloat16)
            if config.data.cache_features
            else None,
            questions=captions if isinstance(model, Stage2) and model.reads_instructions else None,
        )


def _in_pieces(config: RunConfig) -> bool:
    """Whether the language model reads a batch in pieces; a sequence of several pairs stays whole."""
    return config.train.early_backward and not config.data.shots


def language_pieces(config: RunConfig, batch: int, machine: Machine, text_tokens: int) -> int:
    """How many pieces of a stage-2 batch are run backward by themselves, as `Stage2Objective` decides it."""
    images = batch * (config.data.texts_per_image if config.qformer.instruction else 1)
    return piece_count(images, images * config.qformer.queries + text_tokens, cpu=not machine.accelerator)


def step_curve(model: Stage1 | Stage2, config: RunConfig, machine: Machine) -> Callable[[int], int]:
    """Most bytes beside the weights and the optimizer's state, as a function of the micro-batch.

    In stage 2 a batch that is run in another number of pieces is another line.
    """
    if config.stage == "stage1" or not _in_pieces(config):
        return _curve(model, config, machine, 1)
    curves: dict[int, Callable[[int], int]] = {}
    text_tokens = TEXT_TOKENS + PROMPT_TOKENS - 1

    def peak(batch: int) -> int:
        pieces = language_pieces(config, batch, machine, batch * config.data.texts_per_image * text_tokens)
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
    unit = pieces * (config.data.shots + 1)
    if config.train.head_chunk is not None:
        low = unit * max(2 * COUNTED[0], -(-2 * config.train.head_chunk // TEXT_TOKENS))
        at_low, at_high = (max(step_timeline(model, config, n, machine, pieces=pieces)) for n in (low, 2 * low))
        return lambda batch: max(0, at_low + (at_high - at_low) * (batch - low) // low)
    batches = [unit * n for n in (COUNTED if config.stage == "stage1" else COUNTED[:2])]
    timelines = [np.array(step_timeline(model, config, n, machine, pieces=pieces), dtype=np.int64) for n in batches]
    start, slope = timelines[0], timelines[1] - timelines[0]
    bend = timelines[2] - 2 * timelines[1] + start if len(timelines) > 2 else np.zeros_like(start)

    def peak(batch: int) -> int:
        steps = (batch - batches[0]) / unit
        return int((start + steps * slope + steps * (steps - 1) / 2 * bend).max())

    return peak


def _prepare(model: Stage1 | Stage2, config: RunConfig, machine: Machine) -> None:
    """Dtypes of the frozen models, and the settings that change what is kept."""
    assert isinstance(model.vision, VisionEncoder)
    if model.vision.frozen:
        model.vision.to(machine.frozen)
    apply_settings(model, replace(config.train, compile=False))
    if isinstance(model, Stage2):
        language = model.language_model
        language.to(machine.frozen)
        for name, p in language.named_parameters():
            if is_adapter(name):
                p.data = p.data.float()
        language.split_lengths = not machine.accelerator


def _longer_first(lengths_N: Tensor, images: int, pieces: int, longest: int) -> Tensor:
    """Lengths of natural texts, longer about as many images as the largest piece has."""
    extra = round(LONGER_BY[pieces] / (len(lengths_N) / images) ** (2 / 3))
    of_largest_N = torch.arange(len(lengths_N)) % images < images // pieces
    return torch.where(of_largest_N, lengths_N + extra, lengths_N).clamp(max=longest)
