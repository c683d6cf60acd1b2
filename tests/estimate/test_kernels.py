"""What `DeviceKernels` make a graph keep for the backward pass, worked by hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from blip2.estimate.kernels import DeviceKernels, Machine

FP32 = Machine(accelerator=False, autocast=False, frozen=torch.float32)
BF16 = Machine(accelerator=False, autocast=True, frozen=torch.float32)
GPU = Machine(accelerator=True, autocast=True, frozen=torch.bfloat16)


class Kept:
    """A saved tensor; lives as long as the graph that needs it."""

    def __init__(self, tensor: Tensor) -> None:
        # A saved output holds the graph that holds this box, which would then never be freed.
        self.tensor = tensor.detach()


def saved_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of storages that the graph of `forward`'s result keeps, but for the module's own parameters."""
    boxes: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        box = Kept(tensor)
        boxes.add(box)
        return box

    with saved_tensors_hooks(pack, lambda box: box.tensor):
        result = forward()
    own = {t.untyped_storage()._cdata for t in chain(module.parameters(), module.buffers())}
    storages = {storage._cdata: storage for storage in (box.tensor.untyped_storage() for box in boxes)}
    del result  # what kept the graph, and so the boxes, alive until here
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def test_saved_bytes_by_hand() -> None:
    layer = nn.Linear(3, 5)
    x = torch.randn(2, 3, requires_grad=True)

    def forward() -> Tensor:
        layer(x).exp()  # its graph is gone when forward returns
        y = layer(x)  # keeps x (6 numbers), and its own weight, which does not count
        z = y.exp()  # keeps its result (10)
        return z * y.view(2, 5)  # keeps both: z again, and y (10)

    assert saved_bytes(layer, forward) == 4 * (6 + 10 + 10)
    assert saved_bytes(nn.Identity(), forward) == 4 * (6 + 10 + 10 + 15)


def kept(machine: Machine, function: Any) -> int:
    with DeviceKernels(machine):
        return saved_bytes(nn.Identity(), function)


def test_attention_by_hand() -> None:
    q = torch.empty(2, 4, 16, 8, device="meta", requires_grad=True)
    k, v = (torch.empty(2, 4, 32, 8, device="meta", requires_grad=True) for _ in range(2))
    inputs, result, rows = 1024 + 2048 + 2048, 1024, 2 * 4 * 16
    attend = F.scaled_dot_product_attention
    assert kept(FP32, lambda: attend(q, k, v)) == 4 * (inputs + result + rows)
    assert kept(GPU, lambda: attend(q, k, v, dropout_p=0.1)) == 2 * (inputs + result) + 4 * rows
    weights = 2 * 4 * 16 * 32
    assert kept(FP32, lambda: attend(q, k, v, dropout_p=0.1)) >= 4 * (inputs + 2 * weights)
    mask = torch.ones(2, 1, 16, 32, dtype=torch.bool)
    assert kept(FP32, lambda: attend(q, k, v, mask)) == 4 * (inputs + result + rows + mask.numel())


def test_other_kernels_by_hand() -> None:
    x = torch.empty(6, 8, device="meta", requires_grad=True)
    weight = nn.Parameter(torch.empty(5, 8, device="meta"))
    assert kept(FP32, lambda: F.dropout(x, 0.1)) == 4 * 48
    assert kept(GPU, lambda: F.dropout(x, 0.1)) == 48
    assert kept(GPU, lambda: F.dropout(x, 0.1, training=False)) == 0
    assert kept(FP32, lambda: F.linear(x, weight)) == 4 * (48 + 40)
    # one bf16 copy of the weight serves both products
    assert kept(BF16, lambda: F.linear(x, weight) + F.linear(x, weight)) == 2 * (48 + 40)
    half = x.to(torch.bfloat16)
    norm = 2 * 4 * 6  # mean and inverse deviation of each row
    assert kept(BF16, lambda: F.layer_norm(half, (8,))) == pytest.approx(2 * 48 + norm, abs=norm)
    assert kept(GPU, lambda: F.layer_norm(half, (8,))) == 4 * 48 + norm
