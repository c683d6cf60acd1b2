"""Frozen is a fact: one function freezes, one assertion after a step proves it.

LoRA adapters are the one thing in a frozen part that may train; they are recognised by their names.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip2.errors import RunError


@dataclass(frozen=True)
class ParameterRow:
    """Parameter counts of one part of a model."""

    name: str
    trainable: int
    frozen: int


def is_adapter(name: str) -> bool:
    """Whether a dotted name lies in a LoRA adapter: peft gives all parts of one this prefix."""
    return any(part.startswith("lora_") for part in name.split("."))


def freeze(module: nn.Module) -> None:
    """Freeze a module in place: no gradients, eval mode."""
    module.requires_grad_(False)
    module.eval()


def parameter_table(module: nn.Module) -> list[ParameterRow]:
    """Parameter counts of the direct children of a module, in its order.

    A shared parameter counts once, for the first part that holds it; a quantized one counts the
    weights it stands for.
    """
    counts: dict[str, list[int]] = {}
    for name, p in module.named_parameters():
        row = counts.setdefault(name.split(".")[0], [0, 0])
        row[0 if p.requires_grad else 1] += _count(p)
    return [ParameterRow(name, trainable, frozen) for name, (trainable, frozen) in counts.items()]


def assert_frozen(module: nn.Module, what: str = "frozen part") -> None:
    """Prove that nothing in a module but its adapters trains or has received a gradient.

    Raises:
        RunError: names `what` and the first parameter that requires or holds a gradient.
    """
    for name, p in module.named_parameters():
        if is_adapter(name):
            continue
        if p.requires_grad:
            raise RunError(f"{what}: parameter {name} requires a gradient, but this part must stay frozen")
        if p.grad is not None:
            raise RunError(f"{what}: parameter {name} received a gradient, but this part must stay frozen")


def weights_digest(module: nn.Module) -> str:
    """Checksum of all parameters but adapters, to prove "same weights after a step" (16 hex digits).

    Adds up the raw bits of every parameter on its own device, so that it costs one pass and no
    copy; any single changed bit changes it. On a sharded model it covers this process's shard.
    """
    digest = hashlib.sha256()
    for name, p in module.named_parameters():
        if is_adapter(name):
            continue
        digest.update(f"{name} {tuple(p.shape)} {p.dtype} {_bit_sum(p)}\n".encode())
    return digest.hexdigest()[:16]


def _count(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two weights into a byte
    return int(state.shape.numel()) if state is not None else parameter.numel()


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bit_sum(tensor: Tensor) -> int:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if hasattr(local, "__tensor_flatten__"):  # quantized by torchao: several tensors behind one face
        return sum(_bit_sum(getattr(local, name)) for name in local.__tensor_flatten__()[0])
    bits = local.detach().contiguous().view(_SAME_SIZE[local.element_size()])
    return int(bits.sum(dtype=torch.int64))
