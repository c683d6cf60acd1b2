"""AdamW without decay on 1-D tensors, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from blip2.configs import OptimConfig

# Parts whose learning rate `optim.qformer_scale` multiplies.
_QFORMER = ("qformer", "ln_vision")


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, depths: Mapping[str, int] | None = None
) -> torch.optim.AdamW:
    """AdamW over named parameters; biases, norms and other tensors of one axis or none do not decay.

    Every group has a `scale`: `config.qformer_scale` for the Q-Former and what stands in front of it,
    `config.layer_decay` to the power of its depth for what has one, else 1.

    Args:
        depths: blocks above a parameter of an image encoder that trains, by name.
    """
    named = list(parameters)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in named:
        scale = config.qformer_scale if any(part in _QFORMER for part in name.split(".")) else 1.0
        if depths is not None and name in depths:
            scale = config.layer_decay ** depths[name]
        groups.setdefault((config.weight_decay if p.ndim >= 2 else 0.0, scale), []).append(p)
    return torch.optim.AdamW(
        [{"params": found, "weight_decay": decay, "scale": scale} for (decay, scale), found in groups.items()],
        lr=config.lr,
        betas=config.betas,
        fused=_fused(p for _, p in named),
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then cosine down to `min_lr` at the last."""
    if step < config.warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup
    progress = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _fused(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point for p in parameters)
