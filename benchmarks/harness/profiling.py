"""Where the time and memory of one run go: for the claims that miss their target (`--profile`).

Needs torch only, so that it also runs in the environment of a peer.
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# Parts of an operator's name -> where its own time is counted; the first that fits.
KINDS = {
    "compiled, beside matrix products": ("CompiledFxGraph", "cpp_fused", "Torch-Compiled", "triton"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "mkldnn", "::_addmm", "onednn", "::linear"),
    "optimizer": ("adam", "_foreach", "Optimizer"),
    "norms, softmax, GELU, losses": ("norm", "softmax", "gelu", "silu", "loss", "::rsqrt", "::tanh", "::relu"),
    "copies": ("copy", "::cat", "index", "gather", "embedding", "::select", "::repeat", "::contiguous", "scatter"),
    "sums and products by element": ("::add", "::mul", "::sub", "::div", "::sum", "::fill_", "::zero_", "::where"),
    "search": ("topk", "sort", "::max", "::min", "::argmax", "::eq", "::gt", "::lt", "multinomial"),
}


def profiled(run: Callable[[], object]) -> dict[str, Any]:
    """One run's seconds by kind of operator, and its memory: held before it, and most that it adds, in MB of tensors.

    The two are measured in a run each, since either way of looking slows the other's figures.
    """
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    times: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        times[_kind(event.key)] += event.self_cpu_time_total / 1e6
    ordered = sorted(times.items(), key=lambda item: -item[1])
    seconds = {name: float(f"{value:.3g}") for name, value in ordered}
    if any("ompile" in event.key for event in seen.key_averages()):  # nothing can watch inside: time alone
        return {"seconds": seconds}
    gc.collect()
    held = sum(_storages().values())
    with _Live() as live:
        run()
    return {"seconds": seconds, "held_mb": round(held / 1e6), "added_mb": round(live.peak / 1e6)}


def _kind(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "all else")


def _storages() -> dict[int, int]:
    """Bytes of every storage that a tensor holds, by its address."""
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            with suppress(RuntimeError):  # sparse ones and stand-ins of a compiler have no storage
                sizes[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sizes


class _Live(TorchDispatchMode):
    """Bytes of storages that were made while it watches and are still alive; `peak` is the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set(_storages())
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(value, torch.Tensor):
                self._watch(value.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.known or not size:
            return
        self.known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size
