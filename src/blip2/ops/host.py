"""The one way out of torch: from a tensor on any device, of any precision, to numpy, lists and bytes.

bfloat16 has no numpy type and a card's memory no numpy view, so whatever leaves torch goes through here:
floats of less than 32 bits become float32, all else keeps its type. `tests/test_layers.py` holds the code to it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blip2.ops.devices import widened


def to_host(values: Tensor) -> Tensor:
    """The same values on the CPU, without their graph; half precision becomes float32.

    One transfer, in the tensor's own precision; a float32 tensor that is on the CPU already is not copied.
    """
    return widened(values.detach().to("cpu"))


def to_numpy(values: Tensor) -> Any:
    """The values as a numpy array, float32 where they were floats of fewer bits; it may share their memory."""
    return to_host(values).numpy()


def to_list(values: Any) -> Any:
    """The values of a tensor or a numpy array as nested lists of Python's numbers (a number where it has no axis)."""
    return to_host(values).tolist() if isinstance(values, Tensor) else values.tolist()
