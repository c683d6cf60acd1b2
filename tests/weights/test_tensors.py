"""Tensor files: read and written one tensor at a time, in the formats that others read."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2.errors import CheckpointError
from blip2.weights.tensors import (
    INDEX,
    LazyTensor,
    as_bytes,
    open_folder,
    open_pickled,
    open_safetensors,
    write_folder,
    write_safetensors,
)

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def values() -> dict[str, Tensor]:
    """Every dtype, a scalar, an empty tensor, one that is not contiguous."""
    found = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    return found | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.randn(4, 3).T}


def lazy(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(value) for name, value in tensors.items()}


def test_what_we_write_is_read_by_safetensors_and_by_us(tmp_path: Path) -> None:
    path, expected = tmp_path / "a.safetensors", values()
    seen: list[int] = []
    write_safetensors(path, lazy(expected), {"who": "me"}, seen.append)
    theirs, ours = load_file(path), open_safetensors(path)
    assert theirs.keys() == ours.keys() == expected.keys()
    for name, value in expected.items():
        for found in (theirs[name], ours[name].read()):
            assert found.dtype == value.dtype
            assert found.shape == value.shape
            assert torch.equal(as_bytes(found), as_bytes(value))
        assert (ours[name].shape, ours[name].dtype) == (tuple(value.shape), value.dtype)
    assert sum(seen) == sum(v.numel() * v.element_size() for v in expected.values())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {}, {"config": "{}"})
    assert open_safetensors(tmp_path / "a.safetensors") == {}


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def make() -> Tensor:
        nonlocal most
        value = torch.zeros(1000)
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    write_folder(tmp_path, {f"t{n}": LazyTensor((1000,), torch.float32, make) for n in range(20)}, shard_bytes=9000)
    assert len(alive) == 20
    assert most <= 2


def test_shards_and_their_index(tmp_path: Path) -> None:
    expected = {f"layer.{n}": torch.randn(10) for n in range(7)}
    write_folder(tmp_path, lazy(expected), shard_bytes=100)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 280
    assert index["weight_map"].keys() == expected.keys()
    found = open_folder(tmp_path)
    assert all(torch.equal(found[name].read(), value) for name, value in expected.items())


def test_a_folder_of_one_file_and_of_pickles(tmp_path: Path) -> None:
    expected = {"a": torch.randn(3)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(expected, tmp_path / "one" / "model.safetensors")
    torch.save(expected, tmp_path / "two" / "pytorch_model.bin")
    for folder in ("one", "two"):
        assert torch.equal(open_folder(tmp_path / folder)["a"].read(), expected["a"])


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_gives_its_tensors_and_what_stands_beside_them(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "a.pth"
    state = {"w": torch.randn(2, 2), "steps": 3}
    torch.save({"model": state, "epoch": 4, "config": {"a": [1]}}, path, _use_new_zipfile_serialization=new)
    found, beside = open_pickled(path)
    assert found.keys() == {"w"}
    assert torch.equal(found["w"].read(), state["w"])
    assert beside == {"epoch": 4, "config": {"a": [1]}}


def test_a_pickle_without_tensors(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth: holds a list, not tensors by name"):
        open_pickled(tmp_path / "a.pth")
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="b.pth: holds no tensors"):
        open_pickled(tmp_path / "b.pth")


def test_a_failing_read_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_safetensors(tmp_path / "a.safetensors", {"a": LazyTensor((1,), torch.float32, fail)})
    assert list(tmp_path.iterdir()) == []
