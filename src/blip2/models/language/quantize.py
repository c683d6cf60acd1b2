"""Language models in int8 and nf4: which library does it where, and what it weighs.

Only linear layers are quantized. Embeddings and the output head stay as they are, and under
bitsandbytes what transformers keeps out for its precision (T5's `wo`).
"""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.errors import ConfigError
from blip2.models.freezing import is_adapter

# (setting, device) -> library. torchao has nf4 too: loading SmolLM2-135M by it took 22 s on one core, where
# bitsandbytes took 6, and left 417 MB of gaps in the heap beside 55 MB of weights.
LIBRARIES = {
    ("int8", "cuda"): "bitsandbytes",
    ("nf4", "cuda"): "bitsandbytes",
    ("int8", "cpu"): "torchao",
    ("nf4", "cpu"): "bitsandbytes",
}
_EXTRAS = {"bitsandbytes": "gpu", "torchao": "quantize"}


def loading_options(kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize every layer as it is read.

    Args:
        kind: `int8` or `nf4`.
        device: where the model will run.
        dtype: of the computation, and of the weights that stay.

    Raises:
        ConfigError: no library does it on this device, or the one that does is not installed.
    """
    library = LIBRARIES.get((kind, device.type))
    if library is None:
        works = ", ".join(f"{k} on {where}" for k, where in LIBRARIES)
        raise ConfigError(f"language.quantize is {kind!r}: not possible on {device.type}; what works: {works}")
    missing = [name for name in (library, "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"language.quantize is {kind!r}: on {device.type} this needs {missing[0]}: "
            f"pip install 'blip2[{_EXTRAS[library]}]'"
        )
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": str(device)}}


def prepare(model: nn.Module, source: str) -> None:
    """Prepare a model that was just loaded quantized for training through it, in place.

    Raises:
        ConfigError: nothing in it is quantized.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and is_quantized(m.weight)]
    if not layers:
        raise ConfigError(f"language.quantize: {source} has no linear layer that could be quantized")
    # It would log in every call of every layer that int8 products take float16.
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
    for module in layers:
        if hasattr(module.weight, "__tensor_flatten__"):
            module.forward = functools.partial(_int8_linear, module)  # type: ignore[method-assign]
        # Where a CPU has AVX512-BF16, bitsandbytes repacks the weights in the first call without gradient,
        # that is in an evaluation, and then passes no gradient on.
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is in the format of torchao or bitsandbytes."""
    return hasattr(weight, "__tensor_flatten__") or not weight.dtype.is_floating_point


def quantized_layers(model: Any) -> list[nn.Linear]:
    """Layers of a model in full precision, with adapters or without, that bitsandbytes would quantize."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    excluded = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not is_adapter(name)
        and should_convert_module(name.removesuffix(".base_layer"), excluded)
    ]


def quantized_bytes(layers: list[nn.Linear], kind: str) -> int:
    """Bytes of the weights of linear layers: int8 has a float32 scale per row, nf4 one per 64 weights."""
    weights = sum(layer.weight.numel() for layer in layers)
    if kind == "nf4":
        return weights // 2 + weights // 64 * 4
    return weights + 4 * sum(layer.out_features for layer in layers)


class _Int8Linear(torch.autograd.Function):
    """Linear layer on torchao's weights that turns them into floats again for the backward pass.

    torchao's own keeps the floats of every layer from the forward pass on, which is more memory
    than the model had before it was quantized.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.dequantize(grad.dtype), None, None


def _int8_linear(module: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = _Int8Linear.apply(x, module.weight, module.bias)
    return out
