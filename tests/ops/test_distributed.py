"""Gathers of two gloo processes against what one process computes from the whole batch.

The file is its own worker: torchrun starts it as a script, and every process leaves its results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import blip2
from blip2.ops import distributed

WORLD, ROWS = 2, 3
WANTED = [torch.tensor([5, 0, 0, 4]), torch.tensor([1, 2, 1])]
ONE_SIDED = [torch.tensor([3, 4]), torch.tensor([5, 5, 3])]  # nobody asks the first process
TEXTS = [torch.tensor([[2, 9, 3], [2, 3, 0], [2, 8, 3]]), torch.tensor([[2, 5, 6, 7, 3], [2, 3, 0, 0, 0], [2] * 5])]


def full_batch() -> Tensor:
    return torch.randn(WORLD * ROWS, 4, 2, generator=torch.Generator().manual_seed(1))


def loss_of_rows(mine: Tensor, everyone: Tensor) -> Tensor:
    """What a process might ask of its rows and of all rows; not symmetric in them."""
    place = torch.arange(1, everyone.shape[0] + 1).view(-1, 1, 1)
    return (mine.sin().sum(dim=0, keepdim=True) * everyone * place).mean()


def weights_of(rows: Tensor) -> Tensor:
    """Another weight for every row, exact in bf16."""
    return torch.arange(1, len(rows) + 1, dtype=rows.dtype).view(-1, 1, 1).expand_as(rows)


def work(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = full_batch()[rank * ROWS : (rank + 1) * ROWS]
    results: dict[str, Any] = {"rank": distributed.rank(), "world": distributed.world_size()}
    results["gather"] = distributed.gather(mine)
    results["gather_transposed"] = distributed.gather(mine.transpose(0, 2)).transpose(0, 2)
    results["gather_ids"] = distributed.gather(torch.tensor([rank, 7]))
    rows = mine.clone().requires_grad_()
    everyone = distributed.gather_with_grad(rows)
    loss_of_rows(rows, everyone).backward()
    results |= {"gather_with_grad": everyone.detach(), "grad": rows.grad}
    mask = TEXTS[rank] != 0
    results["ids"], results["mask"] = distributed.gather_texts(TEXTS[rank], mask, 0)
    for name, indices in {"fetch": WANTED, "fetch_one_sided": ONE_SIDED}.items():
        for dtype in (torch.float32, torch.bfloat16):
            rows = mine.to(dtype, copy=True).requires_grad_()
            got = distributed.fetch_rows(rows, indices[rank])
            (got * weights_of(got)).sum().backward()
            results |= {f"{name}_{dtype}": got.detach(), f"{name}_{dtype}_grad": rows.grad}
    results["mean"] = distributed.mean_over_processes(torch.tensor([rank + 1.0, 10.0 * rank]))
    torch.save(results, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed."""
    out = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(blip2.__file__).parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    done = subprocess.run([*launch, __file__, str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_ranks(results: list[dict[str, Any]]) -> None:
    assert [(r["rank"], r["world"]) for r in results] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("name", ["gather", "gather_transposed", "gather_with_grad"])
def test_gathers_keep_the_order_of_ranks(results: list[dict[str, Any]], name: str) -> None:
    want = full_batch()
    if name == "gather_transposed":  # rows are then the last axis
        want = torch.cat([want[:ROWS], want[ROWS:]], dim=2)
    for result in results:
        assert torch.equal(result[name], want)


def test_integers_are_gathered(results: list[dict[str, Any]]) -> None:
    assert all(result["gather_ids"].tolist() == [0, 7, 1, 7] for result in results)


def test_gradients_are_those_of_the_sum_of_all_losses(results: list[dict[str, Any]]) -> None:
    full = full_batch().requires_grad_()
    sum(loss_of_rows(full[r * ROWS : (r + 1) * ROWS], full) for r in range(WORLD)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(torch.cat([result["grad"] for result in results]), full.grad)


def test_texts_are_padded_to_the_longest(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["ids"].tolist() == [
            [2, 9, 3, 0, 0],
            [2, 3, 0, 0, 0],
            [2, 8, 3, 0, 0],
            [2, 5, 6, 7, 3],
            [2, 3, 0, 0, 0],
            [2, 2, 2, 2, 2],
        ]
        assert result["mask"].dtype == torch.bool
        assert torch.equal(result["mask"], result["ids"] != 0)


@pytest.mark.parametrize(("name", "indices"), [("fetch", WANTED), ("fetch_one_sided", ONE_SIDED)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_fetched_in_the_order_asked(
    results: list[dict[str, Any]], name: str, indices: list[Tensor], dtype: torch.dtype
) -> None:
    for rank, result in enumerate(results):
        assert torch.equal(result[f"{name}_{dtype}"], full_batch()[indices[rank]].to(dtype))


@pytest.mark.parametrize(("name", "indices"), [("fetch", WANTED), ("fetch_one_sided", ONE_SIDED)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_fetched_rows_go_back_to_who_holds_them(
    results: list[dict[str, Any]], name: str, indices: list[Tensor], dtype: torch.dtype
) -> None:
    full = full_batch().to(dtype).requires_grad_()
    for index in indices:
        rows = full[index]
        (rows * weights_of(rows)).sum().backward()
    assert torch.equal(torch.cat([result[f"{name}_{dtype}_grad"] for result in results]), full.grad)


def test_mean_over_processes(results: list[dict[str, Any]]) -> None:
    assert all(result["mean"].tolist() == [1.5, 5.0] for result in results)


def test_one_process_needs_no_group() -> None:
    x, index = torch.randn(4, 3, requires_grad=True), torch.tensor([2, 2, 0])
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.gather_with_grad(x) is x
    assert torch.equal(distributed.gather(x), x)
    assert torch.equal(distributed.fetch_rows(x, index), x[index])
    ids, mask = distributed.gather_texts(TEXTS[0], TEXTS[0] != 0, 0)
    assert torch.equal(ids, TEXTS[0])
    assert torch.equal(mask, TEXTS[0] != 0)
    assert torch.equal(distributed.mean_over_processes(x), x)


def test_without_gradient_means_so_in_one_process_too() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    assert not distributed.gather(x).requires_grad


if __name__ == "__main__":
    work(Path(sys.argv[1]))
