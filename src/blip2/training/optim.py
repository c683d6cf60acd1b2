"""The optimizer, without weight decay on 1-D tensors, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2.configs import OptimConfig
from blip2.errors import ConfigError
from blip2.training.performance import require_compiler

# Parts whose learning rate `optim.qformer_scale` multiplies.
_QFORMER = ("qformer", "ln_vision")


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, depths: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """`config.name` over named parameters; biases, norms and other tensors of one axis or none do not decay.

    Every group has a `scale` of the learning rate: `config.qformer_scale` for the Q-Former and `ln_vision`,
    `config.layer_decay` to the power of the depth where `depths` has one, else 1.

    Args:
        depths: number of blocks above each parameter of a trained image encoder, by name.

    Raises:
        ConfigError: what the optimizer needs is not installed.
    """
    named = list(parameters)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in named:
        scale = config.qformer_scale if any(part in _QFORMER for part in name.split(".")) else 1.0
        if depths is not None and name in depths:
            scale = config.layer_decay ** depths[name]
        groups.setdefault((config.weight_decay if p.ndim >= 2 else 0.0, scale), []).append(p)
    listed = [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()]
    if config.name == "adamw":
        return torch.optim.AdamW(listed, lr=config.lr, betas=config.betas, fused=_fused(p for _, p in named))
    if config.name == "adamw8bit":
        return _adamw8bit(listed, config)
    if config.name == "adafactor":
        return torch.optim.Adafactor(listed, lr=config.lr)
    return torch.optim.SGD(listed, lr=config.lr, momentum=config.betas[0])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its scale."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]


def _adamw8bit(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError('optim.name adamw8bit needs torchao: pip install "blip2[quantize]"') from error
    require_compiler("optim.name adamw8bit")
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=config.betas)
    return optimizer


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then cosine down to `min_lr` at the last."""
    if step < config.warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup
    progress = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _fused(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.dtype.is_floating_point for p in parameters)
