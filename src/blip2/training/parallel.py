"""Several processes by DDP or FSDP2; a single one needs no launcher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from blip2.configs import RunConfig
from blip2.models.language.model import LanguageModel
from blip2.ops import distributed


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join torchrun's processes (gloo on CPU, NCCL on CUDA); nothing in a plain `python` run."""
    if not dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store for all its attempts, in which the addresses of those that died still stand
        store, rank, world = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"attempt-{restarts}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    else:
        dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shards(parallel: str) -> bool:
    """Whether FSDP2 is used; under `torchrun` also with a single process."""
    return parallel == "fsdp2" and dist.is_initialized()


def wrap(objective: nn.Module, parallel: str, device: torch.device, unused: bool) -> nn.Module:
    """Wrap an objective for the processes there are; itself in a plain run.

    FSDP2 shards each block of the frozen towers by itself, and everything that trains as one group.
    """
    if distributed.world_size() == 1 and not shards(parallel):
        return objective
    if not shards(parallel):
        ids = [device.index] if device.type == "cuda" else None
        # DDP sends the first process's weights to all. torchao's it cannot send, and all have read the same.
        quantized = [name for name, p in objective.named_parameters() if hasattr(p, "__tensor_flatten__")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, quantized)
        return DistributedDataParallel(
            objective, device_ids=ids, broadcast_buffers=False, find_unused_parameters=unused
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in _frozen_blocks(objective):
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    for module in objective.modules():
        if isinstance(module, LanguageModel):
            module.split_lengths = False
    return objective


@contextlib.contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather FSDP2's root parameters for calls that do not go through its forward (evaluation)."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        yield
        return
    # Otherwise a tower block that runs before the first training step becomes the root.
    module._get_fsdp_state()._lazy_init()
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def unused_parameters(config: RunConfig) -> bool:
    """Whether some trained parameters get no gradient.

    A stage-1 loss is left out, or the last layer of a text branch whose outputs nobody uses.
    """
    if config.stage == "stage2":
        return config.qformer.instruction is not None or config.qformer.image_places > 0
    return not (config.loss.itc and config.loss.itm and config.loss.itg)


def _frozen_blocks(objective: nn.Module) -> list[nn.Module]:
    """Blocks of the frozen towers."""
    model = objective.model
    assert isinstance(model, nn.Module)
    towers = [t for name in ("vision", "language_model") if isinstance(t := getattr(model, name, None), nn.Module)]
    return [block for tower in towers for block in _blocks(tower)]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost module lists; T5 keeps the parts of a block in a list as well."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) and len(child) > 1 else _blocks(child)
