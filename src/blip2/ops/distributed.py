"""Gathers over processes; every function is the identity outside a process group.

Shape letters: B rows of this process, G rows of all processes (G = B x world).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from torch import Tensor

from blip2.ops.devices import to_list

_ALONE = False


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Within it this process counts as the only one: for work that every process does by itself."""
    global _ALONE
    before, _ALONE = _ALONE, True
    try:
        yield
    finally:
        _ALONE = before


def world_size() -> int:
    """Number of processes; 1 outside a process group."""
    return dist.get_world_size() if _in_group() else 1


def rank() -> int:
    """Index of this process; 0 outside a process group."""
    return dist.get_rank() if _in_group() else 0


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and not _ALONE


def barrier() -> None:
    """Wait until every process has reached this line."""
    if world_size() > 1:
        dist.barrier()


def gather_with_grad(x_B: Tensor) -> Tensor:
    """Concatenate `x` of all processes along the first axis; gradients flow back to every process.

    The backward sums each process's gradient of a row, so that averaging gradients over processes
    (DDP) gives the gradient of the mean of the losses, as in a single process.
    """
    if world_size() == 1:
        return x_B
    return torch.cat(dist_fn.all_gather(x_B.contiguous()), dim=0)


@torch.no_grad()
def gather(x_B: Tensor) -> Tensor:
    """Concatenate `x` of all processes along the first axis, without gradient."""
    if world_size() == 1:
        return x_B.detach()
    parts = [torch.empty_like(x_B) for _ in range(world_size())]
    dist.all_gather(parts, x_B.contiguous())
    return torch.cat(parts, dim=0)


def gather_texts(ids_BT: Tensor, mask_BT: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Gather token ids and masks whose lengths differ between processes; padded to the longest."""
    if world_size() == 1:
        return ids_BT, mask_BT
    length = torch.tensor(ids_BT.shape[1], device=ids_BT.device)
    dist.all_reduce(length, op=dist.ReduceOp.MAX)
    missing = int(length) - ids_BT.shape[1]
    ids = torch.nn.functional.pad(ids_BT, (0, missing), value=pad_id)
    mask = torch.nn.functional.pad(mask_BT.to(torch.uint8), (0, missing))
    return gather(ids), gather(mask).bool()


def fetch_rows(x_B: Tensor, index_N: Tensor) -> Tensor:
    """Rows of the gathered batch by global index, sending only the requested rows.

    Args:
        x_B: [B, ...] rows held by this process; every process holds as many.
        index_N: [N] int64 global indices of the rows that this process needs.

    Returns:
        [N, ...]; gradients go back to the process that holds the row. Each process sends at most one
        copy of a row per request: N rows travel where a full gather would send G.
    """
    if world_size() == 1:
        return x_B[index_N]
    rows = x_B.shape[0]
    owner_N = index_N // rows
    order = torch.argsort(owner_N, stable=True)
    receive_counts = torch.bincount(owner_N, minlength=world_size())
    send_counts = torch.empty_like(receive_counts)
    dist.all_to_all_single(send_counts, receive_counts)
    send, receive = to_list(send_counts), to_list(receive_counts)
    requested = torch.empty(sum(send), dtype=torch.int64, device=index_N.device)
    dist.all_to_all_single(requested, index_N[order].contiguous(), send, receive)
    fetched: Tensor = _Exchange.apply(x_B[requested - rank() * rows], send, receive)
    return fetched[torch.argsort(order)]


class _Exchange(torch.autograd.Function):
    """Rows go to the processes that requested them; gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.send, ctx.receive = send, receive
        return _all_to_all(rows, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad, ctx.receive, ctx.send), None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
    received = torch.empty(sum(receive), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    dist.all_to_all_single(received, rows.contiguous(), receive, send)
    return received


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor of numbers over processes (for logging)."""
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / world_size()


def mean_of_all(loss: Tensor, count: int) -> Tensor:
    """Scale a mean over `count` local terms so that averaging over processes is the global mean."""
    if world_size() == 1:
        return loss
    counts = mean_over_processes(torch.tensor(float(count), device=loss.device))
    return loss * (count / counts)
