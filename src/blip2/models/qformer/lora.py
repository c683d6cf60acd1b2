"""LoRA adapters on the Q-Former (arXiv 2106.09685), as changes of its weights.

Its layers read weights in more ways than through their own forward (`ln_vision` folded into projections), so an
adapter changes the weight that all of them see. Shape letters: R rank, D widths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blip2.models.freezing import is_adapter
from blip2.models.qformer.model import QFormer
from blip2.ops.devices import without_autocast

_ORIGINAL, _ADAPTER = "parametrizations.weight.original", "parametrizations.weight.0."


class LowRank(nn.Module):
    """A weight plus alpha / rank x B A; B starts at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight_DD: Tensor) -> Tensor:
        with without_autocast(weight_DD.device):
            return weight_DD + (self.scale * (self.lora_B @ self.lora_A)).to(weight_DD.dtype)


def add_qformer_lora(qformer: QFormer, rank: int, alpha: float) -> None:
    """Freeze a Q-Former but for its queries, and add adapters to all linear layers of its layers, in place."""
    for module in list(qformer.layers.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha))
    for name, p in qformer.named_parameters():
        p.requires_grad_(is_adapter(name) or name == "query_tokens")


def merge_qformer_lora(qformer: nn.Module) -> None:
    """Add every adapter to its weight and remove it, in place; a module without adapters stays as it is."""
    for module in list(qformer.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def stored_name(name: str) -> str:
    """The name of a tensor in files: a weight beside an adapter under its own."""
    return name.replace(_ORIGINAL, "weight").replace(_ADAPTER, "")
