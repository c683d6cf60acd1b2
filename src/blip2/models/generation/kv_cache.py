"""Keys and values of what a language model has read, as rows that widen, change places and leave.

transformers' own cache is concatenated anew at every token and copied whole when beams change
places. Rows that go on from one prompt have the prompt in common, so only their new tokens move.

Shape letters: B rows read, N rows that go on, S tokens read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache


class WideLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of rows that go on from what others have read; new tokens are written in place.

    Args:
        layer: of B rows.
        index_N: which of them each row goes on from.
        room: new tokens that will follow, at most.
    """

    def __init__(self, layer: Any, index_N: Tensor, room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.read = self.length = layer.keys.shape[-2]
        self.buffers = [_with_room(x, index_N.to(x.device), room) for x in (layer.keys, layer.values)]
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all keys and values so far."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.length] = new
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows change places with rows of the same prompt: what was read stays where it is."""
        if self.length > self.read:
            for buffer in self.buffers:
                new = buffer[:, :, self.read : self.length]
                new.copy_(new.index_select(0, beam_idx.to(buffer.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.buffers = [buffer.index_select(0, indices.to(buffer.device)) for buffer in self.buffers]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def is_supported(cache: Any) -> bool:
    """Whether a cache consists of layers that can be widened; recurrent and quantized ones cannot."""
    return all(
        isinstance(part, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in part.layers)
        for part in _parts(cache)
    )


def is_plain(cache: Any) -> bool:
    """Whether every layer sees all that was read: no sliding windows."""
    return all(type(layer) is DynamicLayer for part in _parts(cache) for layer in part.layers)


def widen(cache: Any, index_N: Tensor, room: int) -> None:
    """Let N rows go on from the B rows read, with room for so many new tokens."""
    for number, part in enumerate(_parts(cache)):
        own = room if number == 0 else 0  # an encoder's output does not grow
        for n, layer in enumerate(part.layers):
            if type(layer) is DynamicLayer:
                part.layers[n] = WideLayer(layer, index_N, own)
            else:
                layer.batch_select_indices(index_N.to(layer.keys.device))


def reorder(cache: Any, index_N: Tensor) -> None:
    """Rows change places with rows that go on from the same row read."""
    for layer in _parts(cache)[0].layers:
        layer.reorder_cache(index_N)


def select(cache: Any, index_N: Tensor) -> None:
    """Keep only these rows, in this order; repeats are allowed."""
    for part in _parts(cache):
        for layer in part.layers:
            layer.batch_select_indices(index_N.to(layer.keys.device))


def _parts(cache: Any) -> list[Any]:
    """The decoder's own part, and that of the encoder's output where there is one."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


def _with_room(x_BhSd: Tensor, index_N: Tensor, room: int) -> Tensor:
    _, heads, read, width = x_BhSd.shape
    buffer = x_BhSd.new_empty(len(index_N), heads, read + room, width)
    buffer[:, :, :read] = x_BhSd[index_N]
    return buffer
