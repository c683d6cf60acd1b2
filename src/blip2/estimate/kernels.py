"""What a machine's kernels keep for the backward pass, for a training step on the meta device.

Meta tensors have shapes but no memory, so a model of any size is run in seconds. They know neither
autocast nor fused kernels, and have no values that an objective could read: `DeviceKernels` makes them
keep what those kernels keep, and lets texts stay where their values are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from blip2.configs import RunConfig
from blip2.ops.devices import fast_bf16

_MATMULS = {F.linear, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, torch.einsum}
_MATMULS |= {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
_FLOAT32 = {F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.Tensor.softmax}
# What a meta tensor says when it is asked for its value.
_VALUES: dict[Any, Any] = {torch.Tensor.__bool__: False, torch.Tensor.__int__: 0}


@dataclass(frozen=True)
class Machine:
    """What a run is estimated for.

    Args:
        accelerator: a GPU or the like, else a CPU.
        autocast: the trained part runs under bf16 autocast.
        frozen: dtype of the frozen models' weights.
    """

    accelerator: bool
    autocast: bool
    frozen: torch.dtype

    @classmethod
    def of(cls, config: RunConfig, accelerator: bool) -> Machine:
        """As the trainer chooses on an accelerator, or on this computer's CPU."""
        fast = accelerator or fast_bf16(torch.device("cpu"))
        precision = config.train.precision
        return cls(
            accelerator,
            autocast=precision == "bf16" or (precision == "auto" and fast),
            frozen=torch.bfloat16 if fast else torch.float32,
        )


class DeviceKernels(TorchFunctionMode):
    """Makes meta tensors keep for the backward pass what a machine's kernels keep.

    - Fused attention keeps its inputs, its output and one number a row, never the matrix of
      weights that its decomposition on meta keeps. A CPU has no fused attention with dropout.
    - An accelerator's dropout keeps a mask of one byte, a CPU's one of the input's dtype.
    - Autocast: matrix products in bf16, on bf16 copies (kept) of float32 weights; on an
      accelerator layer norm and softmax in float32.
    - Texts, which are on the CPU, stay there when they are moved to the model: what depends on their
      values (lengths, targets) is read from them. They come along where they meet a meta tensor.
    - A meta tensor asked for a value says 0 or no: which texts are hard negatives does not matter.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        # bf16 copies of float32 weights, one of each while the forward pass lasts, as autocast holds them
        self._copies: dict[Tensor, Tensor] | None = {}

    def end_forward(self) -> None:
        """Let go of the copies: what is computed again in the backward pass makes its own."""
        self._copies = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VALUES and args[0].is_meta:
            return _VALUES[func]
        if func is torch.autograd.backward:
            # what is computed again in the backward pass is computed by these kernels too
            with self:
                return _backward(args[0])
        if func is torch.Tensor.to and not args[0].is_meta and args[1:] == (torch.device("meta"),) and not kwargs:
            return args[0]
        if func is torch.Tensor.__getitem__:
            return func(args[0], _readable(args[1]) if not args[0].is_meta else args[1])
        args, kwargs = _together((args, kwargs))
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is F.dropout and self.machine.accelerator:
            return self._dropout(*args, **kwargs)
        if self.machine.autocast and func in _MATMULS:
            args, kwargs = self._cast((args, kwargs), torch.bfloat16)
        elif self.machine.autocast and self.machine.accelerator and func in _FLOAT32:
            args, kwargs = self._cast((args, kwargs), torch.float32)
        return func(*args, **kwargs)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **options: Any,
    ) -> Tensor:
        if self.machine.autocast:
            query, key, value = self._cast((query, key, value), torch.bfloat16)
        if dropout_p and not self.machine.accelerator:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
        mask = attn_mask.to(query.dtype) if attn_mask is not None else None
        out: Tensor = _FusedAttention.apply(query, key, value, mask)
        return out

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, training)[0] if training and p else input

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A value, or nested tuples, lists and dicts of them, with every float32 or bf16 tensor in `dtype`."""
        if isinstance(value, tuple | list):
            return type(value)(self._cast(v, dtype) for v in value)
        if isinstance(value, dict):
            return {k: self._cast(v, dtype) for k, v in value.items()}
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bfloat16):
            return value
        if self._copies is not None and value.is_leaf and value.requires_grad and value.dtype != dtype:
            if value not in self._copies:
                self._copies[value] = value.to(dtype)
            return self._copies[value]
        return value.to(dtype)


def _backward(tensors: tuple[Tensor, ...]) -> None:
    """`torch.autograd.backward` behind the place where it asks for modes like this one."""
    ones = tuple(torch.ones_like(tensor) for tensor in tensors)
    engine = torch.autograd.graph._engine_run_backward
    engine(tensors, ones, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _together(arguments: Any) -> Any:
    """Nested arguments, all their tensors on the meta device where one is."""
    places = {value.is_meta for value in tree_leaves(arguments) if isinstance(value, Tensor)}
    return arguments if len(places) < 2 else tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments)


def _readable(index: Any) -> Any:
    """An index with numbers on the CPU, whichever they are, in place of those that a meta tensor does not know."""
    return tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x, index)


class _FusedAttention(torch.autograd.Function):
    """The output's shape and layout, and what the kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(rows, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
