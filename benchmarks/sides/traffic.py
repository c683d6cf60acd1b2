"""Bytes that a process sends to the others in a stage-1 step: our side and LAVIS's, counted by wrapping collectives.

Counted per process, as a ring or direct exchange sends them among W processes: all_gather of n bytes
sends n (W - 1), all_reduce 2 n (W - 1) / W, all_to_all and scatter what is not kept. The gradient exchange of the
weights is the same on both sides and left out. Torch only: this also runs in LAVIS's environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Counter:
    """Bytes sent, by collective."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}

    def add(self, what: str, count: float) -> None:
        self.sent[what] = self.sent.get(what, 0.0) + count

    def all_gather(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.add("all_gather", x.numel() * x.element_size() * (dist.get_world_size() - 1))
            return real(out, x, *args, **kwargs)

        return call

    def all_reduce(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            world = dist.get_world_size()
            self.add("all_reduce", x.numel() * x.element_size() * 2 * (world - 1) / world)
            return real(x, *args, **kwargs)

        return call

    def all_to_all_single(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Tensor, x: Tensor, got: Any = None, gave: Any = None, *args: Any, **kwargs: Any) -> Any:
            rows, rank, world = len(x), dist.get_rank(), dist.get_world_size()
            own = rows // world if gave is None else gave[rank]
            row = x[:1].numel() * x.element_size() if rows else 0
            self.add("all_to_all", row * (rows - own))
            return real(out, x, got, gave, *args, **kwargs)

        return call

    def scatter(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Tensor, parts: list[Tensor] | None = None, src: int = 0, *args: Any, **kwargs: Any) -> Any:
            if src == dist.get_rank() and parts is not None:
                sent = [x.numel() * x.element_size() for rank, x in enumerate(parts) if rank != src]
                self.add("scatter", sum(sent))
            return real(out, parts, src, *args, **kwargs)

        return call

    def patches(self) -> list[Any]:
        """Patches of `torch.distributed` that count."""
        names = ("all_gather", "all_reduce", "all_to_all_single", "scatter")
        return [mock.patch.object(dist, name, getattr(self, name)(getattr(dist, name))) for name in names]


def ours(settings: dict[str, Any], batch_of: slice) -> tuple[Tensor, Callable[[], None]]:
    """Losses (itc, itm, itg) of this process's share, and their backward pass."""
    from benchmarks.sides.ours import load_batch, stage1_objective
    from blip2.data.batch import Batch

    whole = load_batch(settings)
    assert whole.features is not None
    batch = Batch(
        whole.keys[batch_of], whole.image_ids[batch_of], whole.captions[batch_of], features=whole.features[batch_of]
    )
    objective = stage1_objective(settings, one_sided=False)  # our default: vectors' gradients travel too
    drawn = _negatives(len(whole.captions))
    inner: Any = objective.objective
    inner._negatives = lambda *_: tuple(x[batch_of] for x in drawn)
    losses = objective(batch, 0)
    stacked = torch.stack([losses[name] for name in ("itc", "itm", "itg")])
    return stacked.detach(), stacked.sum().backward


def lavis(settings: dict[str, Any], batch_of: slice) -> tuple[Tensor, Callable[[], None]]:
    """The same of LAVIS."""
    from benchmarks.sides import lavis

    model, samples = lavis.build(settings).train(), lavis._samples(settings)
    texts, images = (x[batch_of] for x in _negatives(len(samples["text_input"])))
    mine = {"image": samples["image"][batch_of], "text_input": samples["text_input"][batch_of]}
    with mock.patch.object(torch, "multinomial", side_effect=list(torch.cat([images, texts]))):
        output = model(mine)
    losses = torch.stack([output.loss_itc, output.loss_itm, output.loss_lm])
    return losses.detach(), output.loss.backward


def _negatives(count: int) -> tuple[Tensor, Tensor]:
    """A negative text per image and image per text, drawn among all others: most lie with other processes."""
    rng = np.random.default_rng(4)
    texts, images = ((np.arange(count) + rng.integers(1, count, count)) % count for _ in range(2))
    return torch.from_numpy(texts), torch.from_numpy(images)


def main() -> None:
    """One process of `world`: count, average the losses, and let rank 0 print."""
    kind, rank, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(settings["threads"])
    rendezvous = f"file://{Path(settings['folder']).resolve()}/{kind}-group"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=settings["world"])
    count = Counter()
    share = len(np.load(Path(settings["folder"]) / "inputs.npz")["captions"]) // settings["world"]
    patches = count.patches()
    for patch in patches:
        patch.start()
    losses, backward = {"ours": ours, "lavis": lavis}[kind](settings, slice(rank * share, (rank + 1) * share))
    backward()
    for patch in patches:
        patch.stop()
    total = torch.tensor([*losses.tolist(), sum(count.sent.values())], dtype=torch.float64)
    dist.all_reduce(total)
    total /= settings["world"]
    if rank == 0:
        record = {"losses": total[:3].tolist(), "bytes": float(total[3]), "of_rank_0": count.sent}
        print(json.dumps(record), file=replies, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
