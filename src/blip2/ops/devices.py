"""Devices and precisions, decided in one place: what `auto` means, and the one way out of torch.

bfloat16 has no numpy type and a card's memory no numpy view, so whatever leaves torch goes through `to_host`,
`to_numpy` or `to_list`: floats of less than 32 bits become float32, all else keeps its type. `tests/test_layers.py`
holds the code to it.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from blip2.configs import PRECISIONS
from blip2.errors import ConfigError

# Decides what `auto` means, whatever the processor: to reproduce a run, and to test both precisions.
PRECISION_VARIABLE = "BLIP2_PRECISION"
# Up to so many parameters a language model on a CPU runs in float32: its weights are a few cached megabytes a layer.
SMALL = 500_000_000


def pick_device(name: str | torch.device, setting: str = "device") -> torch.device:
    """A device by its name; `auto` is CUDA where there is one, this process's own under `torchrun`, else the CPU.

    Args:
        setting: what the error calls the name.

    Raises:
        ConfigError: torch knows no such device, or sees none here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{setting} is {name!r}: torch knows no such device: use auto, cpu or cuda") from error
    if device.type == "cpu":
        return device
    backend = getattr(torch, device.type, None)  # torch.cuda, torch.mps, torch.xpu, ...; none of `meta`
    if backend is None or not backend.is_available():
        kind = device.type.upper()
        raise ConfigError(f"{setting} is {str(name)!r}, but torch sees no {kind} device here: use cpu or auto")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if (device.index or 0) >= backend.device_count():
        raise ConfigError(f"{setting} is {str(name)!r}, but torch sees {backend.device_count()} of them here")
    return device


def fast_bf16(device: torch.device | str) -> bool:
    """Whether `auto` means bf16 on a device: where it multiplies faster than fp32, unless BLIP2_PRECISION decides.

    CUDA, and CPUs with AVX512-BF16 or AMX, have such instructions. Elsewhere bf16 is emulated: on an AVX2-only
    CPU a bf16 matrix product took 6 times as long.

    Raises:
        ConfigError: BLIP2_PRECISION is neither fp32, bf16 nor auto.
    """
    precision = os.environ.get(PRECISION_VARIABLE) or "auto"
    if precision not in PRECISIONS:
        raise ConfigError(f"{PRECISION_VARIABLE} is {precision!r}: it must be one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision == "bf16"
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return kind == "cpu" and any(check() for check in checks if check is not None)


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of frozen weights: bfloat16 where `fast_bf16`, else float32."""
    return torch.bfloat16 if fast_bf16(device) else torch.float32


def writing_dtype(device: torch.device | str, parameters: int) -> torch.dtype:
    """The dtype of the weights of a language model that generates text.

    On a CPU a small one generates no faster in bf16, since a step has few rows and spends its time between the
    matrix products, and in float32 its text does not depend on what else is in the batch.

    Args:
        parameters: about how many the model has.
    """
    precision = os.environ.get(PRECISION_VARIABLE) or "auto"
    if precision == "auto" and torch.device(device).type == "cpu" and parameters <= SMALL:
        return torch.float32
    return fast_dtype(device)


def uses_bf16(device: torch.device | str, precision: str) -> bool:
    """Whether a setting of `auto`, `fp32` or `bf16` means bf16 on a device."""
    return precision == "bf16" or (precision == "auto" and fast_bf16(device))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """bf16 autocast for `bf16`, and for `auto` where it is fast; else fp32."""
    return (
        torch.autocast(device.type, dtype=torch.bfloat16) if uses_bf16(device, precision) else contextlib.nullcontext()
    )


def widened(values: Tensor) -> Tensor:
    """Half precision in float32; other types as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Every operator in the precision of what it is given, inside autocast too."""
    known = torch.amp.autocast_mode.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def to_host(values: Tensor) -> Tensor:
    """The same values on the CPU, without their graph; half precision becomes float32.

    One transfer, in the tensor's own precision; a float32 tensor that is on the CPU already is not copied.
    """
    return widened(values.detach().to("cpu"))


def to_numpy(values: Tensor) -> Any:
    """The values as a numpy array, float32 where they were floats of fewer bits; it may share their memory."""
    return to_host(values).numpy()


def to_list(values: Any, digits: int | None = None) -> Any:
    """The values of a tensor or a numpy array as nested lists of Python's numbers (a number where it has no axis).

    Args:
        digits: decimals that a tensor's values are rounded to; None keeps them all.
    """
    if not isinstance(values, Tensor):
        return values.tolist()
    values = to_host(values)
    return values.tolist() if digits is None else values.double().round(decimals=digits).tolist()
