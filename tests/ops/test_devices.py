"""What `auto` means: devices, precisions, and the variable that decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import pretend

from blip2.errors import ConfigError
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import (
    autocast,
    fast_bf16,
    fast_dtype,
    pick_device,
    to_host,
    to_list,
    to_numpy,
    uses_bf16,
    without_autocast,
    writing_dtype,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_variable_decides_what_auto_means(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_PRECISION", precision)
    half = precision == "bf16"
    assert fast_bf16("cpu") is fast_bf16("cuda") is half
    assert fast_dtype("cpu") == (torch.bfloat16 if half else torch.float32)
    # what a run asks for itself stays what it asks for
    assert [uses_bf16("cpu", precision) for precision in ("auto", "fp32", "bf16")] == [half, False, True]
    with autocast(CPU, "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == fast_dtype("cpu")


@pytest.mark.parametrize("unset", ["", "auto"])
def test_without_it_the_processor_decides(unset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_PRECISION", unset)
    flags = (torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported())
    assert fast_bf16("cpu") == any(flags)


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_PRECISION", "half")
    with pytest.raises(ConfigError, match="BLIP2_PRECISION is 'half': it must be one of auto, fp32, bf16"):
        fast_bf16("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_devices_that_are_not_there() -> None:
    assert pick_device("auto") == CPU
    assert pick_device(CPU) == CPU
    with pytest.raises(ConfigError, match="device is 'cuda:1', but torch sees no CUDA device here: use cpu or auto"):
        pick_device("cuda:1")
    with pytest.raises(ConfigError, match="train.device is 'gpu': torch knows no such device"):
        pick_device("gpu", "train.device")
    for name in ("meta", "xpu", "cuda"):
        with pytest.raises(ConfigError, match=f"device is '{name}', but torch sees no {name.upper()} device here"):
            pick_device(name)


@pytest.mark.skipif(pretend.UNAVAILABLE is not None, reason=str(pretend.UNAVAILABLE))
def test_another_accelerator_than_cuda() -> None:
    with pretend.pretend() as device:
        assert pick_device("pretend:0") == device
        with pytest.raises(ConfigError, match="device is 'pretend:3', but torch sees 1 of them here"):
            pick_device("pretend:3")
    with pytest.raises(ConfigError, match="torch sees no PRETEND device here"):
        pick_device("pretend:0")


def test_what_decides_is_float32_inside_autocast() -> None:
    """Cosines that differ by 2e-4, which bf16 cannot tell apart, are ranked right."""
    queries_BQE = torch.nn.functional.normalize(
        torch.tensor([[[1.0, 0.02], [1.0, 0.0]], [[1.0, 0.03], [1.0, 0.0]]]), dim=-1
    )
    texts_GE = torch.nn.functional.normalize(torch.tensor([[1.0, 0.05]]), dim=-1)
    with autocast(CPU, "bf16"):
        similarity = query_text_similarity(queries_BQE, texts_GE)
    assert similarity.dtype == torch.float32
    assert similarity[1, 0] > similarity[0, 0]
    torch.testing.assert_close(similarity, query_text_similarity(queries_BQE, texts_GE), rtol=0, atol=0)


def test_without_autocast_is_the_plain_product() -> None:
    x = torch.randn(3, 3)
    with autocast(CPU, "bf16"), without_autocast(CPU):
        assert torch.equal(x @ x, torch.mm(x, x))
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "small"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_small_language_model_writes_in_float32_on_a_cpu(
    precision: str, small: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP2_PRECISION", precision)
    assert writing_dtype("cpu", 135_000_000) == small
    assert writing_dtype("cpu", 2_700_000_000) == fast_dtype("cpu")
    assert writing_dtype("cuda", 135_000_000) == fast_dtype("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_arrive_as_float32(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.5, -2.0], [3.0, 0.25]], dtype=dtype, requires_grad=True)
    array = to_numpy(values * 2)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [[1.0, -4.0], [6.0, 0.5]])
    assert to_list(values * 2) == [[1.0, -4.0], [6.0, 0.5]]
    assert to_list((values * 2)[0, 0]) == 1.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float64])
def test_other_types_are_kept(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1], dtype=dtype)
    assert torch.from_numpy(to_numpy(values)).dtype == dtype
    assert to_list(values) == [0, 1, 1]


def test_numpy_arrays_are_listed_too() -> None:
    values = to_list(np.array([1, 2], dtype=np.int64))
    assert values == [1, 2]
    assert type(values[0]) is int


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
