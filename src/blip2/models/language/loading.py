"""Frozen language models out of folders, hub ids and configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blip2.configs import LanguageConfig
from blip2.errors import ConfigError
from blip2.models import hub, towers
from blip2.models.freezing import freeze
from blip2.models.language import quantize
from blip2.models.language.model import LanguageModel
from blip2.ops.devices import fast_dtype


def load_language_model(
    config: LanguageConfig,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    device_map: str | dict[str, Any] | None = None,
) -> LanguageModel:
    """Frozen language model of a tower's name, a folder or a hub id.

    Args:
        dtype: of the weights; None takes bfloat16 where the hardware multiplies it fast, else
            float32.
        device: where the model will run. One that `config.quantize` quantizes is loaded for it,
            layer by layer; any other is loaded on the CPU, to be moved.
        device_map: passed to transformers, to spread a large model over devices.

    Raises:
        CheckpointError: the model cannot be found, reached or read completely.
        ConfigError: a T5 in float16, in which its activations overflow; `config.quantize` cannot
            be done on this device.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    source = towers.folder(config.name)
    whole = hub.load_config(source)
    part = hub.part_of_blip2(whole, "text_config")
    part.update(towers.overrides(config.name))
    options: dict[str, Any] = {} if part is whole else {"key_mapping": {r"^language_model\.": ""}}
    if device_map is not None:
        options["device_map"] = device_map
    if dtype == torch.float16 and "t5" in part.model_type:
        raise ConfigError(f"language.name is {config.name!r}: T5 overflows in float16, use bf16 or fp32")
    kind = AutoModelForSeq2SeqLM if part.is_encoder_decoder else AutoModelForCausalLM
    dtype = dtype or fast_dtype(device)
    if config.quantize:
        options = quantize.loading_options(config.quantize, torch.device(device), dtype) | options
    loaded = hub.load_model(kind, source, part, dtype, **options)
    if config.quantize:
        quantize.prepare(loaded, source)
    model = LanguageModel(loaded)
    freeze(model)
    return model


def parameter_count(config: LanguageConfig) -> int:
    """About how many parameters a language model has, from its config: blocks of 12 width², and the embeddings.

    A config that does not tell counts as a large one.
    """
    part = hub.part_of_blip2(hub.load_config(towers.folder(config.name)), "text_config")
    layers, width, words = (getattr(part, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    if not (isinstance(layers, int) and isinstance(width, int) and isinstance(words, int)):
        return 1 << 62
    return 12 * layers * width**2 * (2 if part.is_encoder_decoder else 1) + words * width


def language_model_from_config(config: Any, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Frozen language model with random weights; without memory inside `torch.device("meta")`."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    built = kind.from_config(config, dtype=dtype)
    head, embeddings = built.get_output_embeddings(), built.get_input_embeddings()
    # transformers ties every T5 that is not loaded; this setting marks those published with a head of their own
    if getattr(config, "scale_decoder_outputs", True) is False and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model = LanguageModel(built)
    freeze(model)
    return model
