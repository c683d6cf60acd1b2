"""Backward passes during the forward pass: a part of a step's loss is done with before the next part begins.

Autograd keeps what all parts of a loss need until one backward pass over their sum. Where the parts have only
parameters and a few tensors in common, each can run its own as soon as its loss is known, so that a step holds
the activations of one part at a time. Nothing is computed twice, and the gradients are the same sums.

DDP and FSDP2 see one forward and one backward pass: parameters have stand-ins meanwhile, whose gradients go to
the parameters themselves in the backward pass that the trainer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip2.ops.devices import without_autocast

# Parts of a loss from the tensors they start from; each is done with once the next one is asked for.
Parts = Callable[[Sequence[Tensor]], Iterator[dict[str, Tensor]]]


def add_up(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The losses of all parts, by name."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found[name] + value if name in found else value
    return found


def early_backward(model: nn.Module, inputs: Sequence[Tensor], parts: Parts) -> dict[str, Tensor]:
    """The losses of all parts, by name, with their gradients known already.

    Args:
        model: its trained parameters are what the parts depend on, beside `inputs`.
        inputs: tensors that the parts have in common, with graphs of their own or none.
        parts: given leaves in place of `inputs`, it yields parts, each a dict of named scalars. Parts may share
            no graph but autocast's copies of weights, which keep nothing, and add up where they share a name.

    Returns:
        Scalars to run backward on as a sum, times any factor: each by itself has no gradient of its own.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stand_ins = {f"model.{name}": _leaf(p) for name, p in parameters.items()}
    leaves = [_leaf(x) for x in inputs]

    def done() -> Iterator[dict[str, Tensor]]:
        for part in parts(leaves):
            loss = torch.stack(list(part.values())).sum()
            # autocast is for forward passes: a backward pass within it would be cast a second time
            with without_autocast(loss.device):
                torch.autograd.backward(loss)
            yield {name: value.detach() for name, value in part.items()}

    found: dict[str, Tensor] = torch.func.functional_call(_Calling(model), stand_ins, (lambda: add_up(done()),))
    both = zip((*parameters.values(), *inputs), (*stand_ins.values(), *leaves), strict=True)
    # what no part used stays out of the graph: DDP asks the graph what is unused
    known = [(x, leaf.grad) for x, leaf in both if leaf.grad is not None]
    values = PrecomputedGrad.apply(torch.stack(list(found.values())), [g for _, g in known], *(x for x, _ in known))
    return dict(zip(found, values.unbind(), strict=True))


def _leaf(x: Tensor) -> Tensor:
    """The same numbers without their graph."""
    return x.detach().requires_grad_(x.requires_grad)


class _Calling(nn.Module):
    """Calls a function while parameters of `model` have stand-ins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
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
