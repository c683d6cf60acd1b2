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
from blip2.weights.lazy_tensors import (
    INDEX,
    PICKLED_INDEX,
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
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def values() -> dict[str, Tensor]:
    """Every dtype, a scalar, an empty tensor, one that is not contiguous, and what is equal to nothing."""
    values = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    return values | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 3).T,
        "nan": torch.tensor([torch.nan, -0.0]),
    }


def lazy(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(value) for name, value in tensors.items()}


def test_what_we_write_is_read_by_safetensors_and_by_us(tmp_path: Path) -> None:
    path, expected = tmp_path / "a.safetensors", values()
    seen: list[int] = []
    write_safetensors(path, lazy(expected), {"who": "me"}, seen.append)
    theirs, ours = load_file(path), open_safetensors(path)
    assert theirs.keys() == ours.keys() == expected.keys()
    for name, value in expected.items():
        for read in (theirs[name], ours[name].read()):
            assert read.dtype == value.dtype
            assert read.shape == value.shape
            assert torch.equal(as_bytes(read), as_bytes(value))
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
    tensors = open_folder(tmp_path)
    assert all(torch.equal(tensors[name].read(), value) for name, value in expected.items())


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
    tensors, other_entries = open_pickled(path)
    assert tensors.keys() == {"w"}
    assert torch.equal(tensors["w"].read(), state["w"])
    assert other_entries == {"epoch": 4, "config": {"a": [1]}}


def test_a_pickle_without_tensors(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth: holds a list, not tensors by name"):
        open_pickled(tmp_path / "a.pth")
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="b.pth: holds no tensors"):
        open_pickled(tmp_path / "b.pth")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.uint16),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
    ids=["complex", "uint16", "sparse", "meta"],
)
def test_what_no_weights_file_of_ours_can_hold_is_refused_when_it_is_opened(tmp_path: Path, value: Tensor) -> None:
    torch.save({"good": torch.zeros(1), "odd": value}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth: odd is of a type that is not supported"):
        open_pickled(tmp_path / "a.pth")


def test_a_safetensors_type_that_we_do_not_know_is_named(tmp_path: Path) -> None:
    save_file({"odd": torch.zeros(2, dtype=torch.uint16)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="a.safetensors: odd is of type U16, which is not supported"):
        open_safetensors(tmp_path / "a.safetensors")


def test_pickles_in_shards(tmp_path: Path) -> None:
    expected = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    places = {name: f"pytorch_model-0000{n}-of-00002.bin" for n, name in enumerate(expected, 1)}
    for name, file in places.items():
        torch.save({name: expected[name]}, tmp_path / file)
    (tmp_path / PICKLED_INDEX).write_text(json.dumps({"weight_map": places}))
    tensors = open_folder(tmp_path)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name].read(), value) for name, value in expected.items())


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        "null",
        "\xff",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": [1]}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "../other/model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
    ],
)
def test_an_index_that_is_none_or_leads_out_of_the_folder(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index, "latin-1")
    with pytest.raises(CheckpointError, match=f"{INDEX}: not an index of shards$"):
        open_folder(tmp_path)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """Opening a file of 64 MB takes little memory, and so does reading its tensors one after the other."""
    size = 4_000_000
    made = {f"t{n}": LazyTensor((size,), torch.float32, lambda: torch.zeros(size)) for n in range(4)}
    write_safetensors(tmp_path / "a.safetensors", made)
    tensors = open_safetensors(tmp_path / "a.safetensors")
    alive: list[weakref.ref[Tensor]] = []
    for lazy in tensors.values():
        alive.append(weakref.ref(lazy.read()))
        assert [ref for ref in alive if ref() is not None] == []
    assert (tmp_path / "a.safetensors").stat().st_size > 4 * 4 * size


def test_another_shape_of_the_same_values() -> None:
    value = torch.arange(6.0)
    turned = LazyTensor.of(value).reshaped(1, 2, 3)
    assert (turned.shape, turned.nbytes) == ((1, 2, 3), 24)
    assert torch.equal(turned.read(), value.reshape(1, 2, 3))


def test_a_failing_read_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_safetensors(tmp_path / "a.safetensors", {"a": LazyTensor((1,), torch.float32, fail)})
    assert list(tmp_path.iterdir()) == []
