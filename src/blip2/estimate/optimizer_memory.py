"""Bytes of an optimizer's state, and of what its step holds on top, from the shapes of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from blip2.configs import OptimConfig

# torchao's AdamW8bit: a float32 scale for so many codes of a byte; smaller or uneven tensors stay in float32.
_BLOCK, _SMALLEST = 256, 4096


def state_bytes(parameters: Iterable[nn.Parameter], config: OptimConfig) -> int:
    """Bytes of state that stay between steps, for trained parameters (of any device)."""
    return sum(_state_of(p, config) for p in parameters)


def step_bytes(parameters: Sequence[nn.Parameter], config: OptimConfig, accelerator: bool) -> int:
    """Most bytes that the optimizer's step makes and drops again.

    AdamW's is one fused operation. Adafactor, SGD with decay and AdamW in 8 bits go tensor by tensor, with one
    float32 copy of each (Adafactor: that of the one before too; 8 bits: of both moments); on an accelerator SGD
    takes all tensors at once.
    """
    sizes = [4 * p.numel() for p in parameters]
    decayed = [4 * p.numel() for p in parameters if p.ndim >= 2]
    if config.name == "adafactor":
        return sum(sorted(sizes)[-2:])
    if config.name == "adamw8bit":
        return 2 * max(sizes, default=0)
    if config.name == "sgd" and config.weight_decay:
        return sum(decayed) if accelerator else max(decayed, default=0)
    return 0


def _state_of(p: nn.Parameter, config: OptimConfig) -> int:
    count = p.numel()
    if config.name == "sgd":
        return 4 * count if config.betas[0] else 0
    if config.name == "adafactor":
        return 4 * (count // p.shape[-1] + count // p.shape[-2]) if p.ndim > 1 else 4 * count
    if config.name == "adamw8bit" and count >= _SMALLEST and count % _BLOCK == 0:
        return 2 * (count + 4 * count // _BLOCK)
    return 8 * count
