"""LoRA adapters on a frozen language model (arXiv 2106.09685), through peft."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from blip2.configs import LoraConfig
from blip2.errors import ConfigError
from blip2.models.freezing import is_adapter
from blip2.models.language.model import LanguageModel
from blip2.models.language.quantize import is_quantized

ALL_LINEAR = "all-linear"


def add_lora(language_model: LanguageModel, config: LoraConfig) -> None:
    """Add trainable adapters to layers of a frozen language model, in place.

    They start without effect (B is zero), in float32 whatever the dtype of the model, and are its
    only trainable parameters.

    Raises:
        ConfigError: peft is not installed, or the model has no linear layer of a name in
            `config.targets`.
    """
    peft = _peft(config)
    model = language_model.model
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=_targets(model, config)
    )
    with warnings.catch_warnings():
        # peft warns that it transposes Conv1D weights (GPT-2), as it should.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        peft.inject_adapter_in_model(settings, model)
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))
        if is_adapter(name):
            p.data = p.data.float()


def merge_lora(model: nn.Module) -> None:
    """Add every adapter inside a module to its base weight and remove it, in place.

    The product is taken in float32 and rounded once to the dtype of the weight. A module without
    adapters stays as it is.

    Raises:
        ConfigError: the weights are quantized.
    """
    if not any(is_adapter(name) for name, _ in model.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    if any(is_quantized(layer.get_base_layer().weight) for layer in layers.values()):
        raise ConfigError("adapters cannot be merged into quantized weights: load the run with quantize='none' first")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())


def _peft(config: LoraConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"lora.rank is {config.rank}: LoRA needs peft: pip install 'blip2[train]' ({error})"
        ) from error
    return peft


def _targets(model: Any, config: LoraConfig) -> list[str] | str:
    """Names of the layers to adapt, as peft takes them.

    Raises:
        ConfigError: a name that no linear layer of the model has; the message lists those there are.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if config.targets is None:
        usual = KNOWN.get(model.config.model_type, ALL_LINEAR)
        return usual if isinstance(usual, str) else list(usual)
    if config.targets == ALL_LINEAR:
        return ALL_LINEAR
    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if _linear(module) and module is not head]
    targets = [name.strip() for name in config.targets.split(",")]
    for target in targets:
        if not any(f".{layer}".endswith(f".{target}") for layer in layers):
            known = ", ".join(dict.fromkeys(layer.rsplit(".", 1)[-1] for layer in layers))
            raise ConfigError(
                f"lora.targets is {config.targets!r}: this {model.config.model_type} has no linear layer {target!r}; "
                f"it has {known}"
            )
    return targets


def _linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
