"""The way out of torch: values, types and shapes that arrive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import pretend

from blip2.ops.host import to_host, to_list, to_numpy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_arrive_as_float32(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.5, -2.0], [3.0, 0.25]], dtype=dtype, requires_grad=True)
    found = to_numpy(values * 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1.0, -4.0], [6.0, 0.5]])
    assert to_list(values * 2) == [[1.0, -4.0], [6.0, 0.5]]
    assert to_list((values * 2)[0, 0]) == 1.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float64])
def test_other_types_are_kept(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1], dtype=dtype)
    assert torch.from_numpy(to_numpy(values)).dtype == dtype
    assert to_list(values) == [0, 1, 1]


def test_numpy_arrays_are_listed_too() -> None:
    found = to_list(np.array([1, 2], dtype=np.int64))
    assert found == [1, 2]
    assert type(found[0]) is int


def test_float32_on_the_cpu_is_not_copied() -> None:
    values = torch.zeros(3)
    assert to_host(values).data_ptr() == values.data_ptr()


@pytest.mark.skipif(pretend.UNAVAILABLE is not None, reason=str(pretend.UNAVAILABLE))
def test_it_brings_tensors_from_an_accelerator() -> None:
    with pretend.pretend() as device:
        values = torch.arange(4, device=device).to(torch.bfloat16) / 2
        with pytest.raises(RuntimeError):
            values.numpy()
        assert to_host(values).device.type == "cpu"
        np.testing.assert_array_equal(to_numpy(values), np.array([0, 0.5, 1, 1.5], np.float32))
