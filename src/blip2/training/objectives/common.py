"""What objectives share: image features of a batch, and backward passes during the forward pass.

Shape letters: B pairs of this process, P patches, C image-encoder channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from blip2.data.batch import Batch
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.ops.devices import without_autocast

Losses = dict[str, Tensor]


class Objective(Protocol):
    """An objective whose losses come in parts. The parts share nothing but `inputs` and the model's parameters."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The losses, by name; their sum is trained."""

    def inputs(self, batch: Batch, step: int) -> list[Tensor]:
        """The tensors that all parts start from."""

    def parts(self, batch: Batch, step: int, inputs: Sequence[Tensor]) -> Iterator[Losses]:
        """Losses that add up to those of a call; each part is done with once the next one is asked for."""


class EarlyBackward(nn.Module):
    """An objective, each part of which runs its backward pass before the next part begins.

    Autograd keeps what all parts of a loss need until one backward pass over their sum. With this a step holds the
    activations of one part at a time. Nothing is computed twice, and the gradients are the same sums.

    DDP and FSDP2 see one forward and one backward pass: parameters have stand-ins meanwhile, whose gradients go to
    the parameters themselves in the backward pass that the trainer runs. The losses are scalars to run backward on
    as a sum, times any factor: each by itself has no gradient of its own. Without gradients (evaluation) they are
    the objective's own.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    @property
    def model(self) -> nn.Module:
        """The objective's."""
        return self.objective.model

    def forward(self, batch: Batch, step: int) -> Losses:
        """The objective's losses, with their gradients known already."""
        if not torch.is_grad_enabled():
            return self.objective(batch, step)
        inputs = self.objective.inputs(batch, step)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        stand_ins = {f"model.{name}": _leaf(p) for name, p in parameters.items()}
        leaves = [_leaf(x) for x in inputs]

        def run() -> Losses:
            return add_up(map(_run_backward, self.objective.parts(batch, step, leaves)))

        losses: Losses = torch.func.functional_call(_Calling(self.model), stand_ins, (run,))
        pairs = zip((*parameters.values(), *inputs), (*stand_ins.values(), *leaves), strict=True)
        # what no part used stays out of the graph: DDP asks the graph what is unused
        known = [(x, leaf.grad) for x, leaf in pairs if leaf.grad is not None]
        values = PrecomputedGrad.apply(
            torch.stack(list(losses.values())), [g for _, g in known], *(x for x, _ in known)
        )
        return dict(zip(losses, values.unbind(), strict=True))


def add_up(parts: Iterable[Losses]) -> Losses:
    """The losses of all parts, by name."""
    total: Losses = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def image_features(model: Stage1 | Stage2, batch: Batch, drop: float = 0.0) -> Tensor:
    """Image features of a batch; while the model trains, a share `drop` of each image's patches is left out."""
    if batch.features is not None:
        features_BPC = batch.features
    elif batch.pixels is not None and model.vision is not None:
        features_BPC = model.vision(batch.pixels)
    else:
        raise ValueError("a batch needs features, or pixels and a model with its image encoder")
    if not drop or not model.training:
        return features_BPC
    return drop_tokens(features_BPC, drop, int(getattr(model.vision, "prefix", 0)))


def drop_tokens(features_BPC: Tensor, drop: float, prefix: int) -> Tensor:
    """Every image with another random share 1 - `drop` of its patches.

    Args:
        prefix: tokens in front of the patches ([CLS], registers), always kept.
    """
    B, P, C = features_BPC.shape
    keep = max(1, round((P - prefix) * (1 - drop)))
    chosen_BK = torch.rand(B, P - prefix, device=features_BPC.device).argsort(dim=1)[:, :keep] + prefix
    first_BR = torch.arange(prefix, device=features_BPC.device).expand(B, -1)
    index_BK = torch.cat([first_BR, chosen_BK], dim=1)
    return features_BPC.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, C))


def _leaf(x: Tensor) -> Tensor:
    """The same numbers without their graph."""
    return x.detach().requires_grad_(x.requires_grad)


def _run_backward(part: Losses) -> Losses:
    loss = torch.stack(list(part.values())).sum()
    # autocast is for forward passes: a backward pass within it would be cast a second time
    with without_autocast(loss.device):
        torch.autograd.backward(loss)
    return {name: value.detach() for name, value in part.items()}


class _Calling(nn.Module):
    """Calls a function while parameters of `model` have stand-ins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Losses]) -> Losses:
        return run()


class PrecomputedGrad(torch.autograd.Function):
    """Values as they are; in the backward pass, gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: list[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return values.clone()

    @staticmethod
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        # of a sum: the same factor for all
        gradients = [g.mul_(factors[0].to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None
        return (None, None, *gradients)
