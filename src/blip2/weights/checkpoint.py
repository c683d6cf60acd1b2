"""What an opened checkpoint is, whatever its format."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from blip2.configs import LanguageConfig, RunConfig, from_dict
from blip2.errors import CheckpointError
from blip2.weights.lazy_tensors import Tensors
from blip2.weights.loading import Allowed

Format = Literal["blip2", "hf", "lavis"]

# How the two families of language models are asked and ended (arXiv 2301.12597, section 4.1; LAVIS).
OPT_END, T5_QUESTION = "\n", "Question: {} Short answer:"
# InstructBLIP (arXiv 2305.06500): what is typed is the instruction, of up to 128 tokens in the Q-Former and the
# language model; the caption prompt is that of its evaluation on NoCaps. LAVIS gives Vicuna `</s>` to begin with.
INSTRUCT_LANGUAGE = LanguageConfig(prompt="A short image description.", question="{}", max_text=256)
INSTRUCT_TEXT: dict[str, Any] = {"instruction": "prompt", "max_text": 128}
VICUNA_START = "</s>"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: how to build its model, and its tensors.

    Args:
        source: file or folder, for messages.
        format: whose it is.
        config: of the run; its towers are those that the checkpoint was trained with.
        tensors: what trains, under our names.
        vision: an image encoder that came along in a LAVIS file (fine-tuned ones do), under the
            names of `Blip2VisionModel`; empty elsewhere.
        vision_config: transformers config of that encoder, in files of ours.
        allowed: what a load may leave out or start fresh because the format does not hold it.
        partial: a bare Q-Former, which can start a training and cannot be used by itself.
    """

    source: str
    format: Format
    config: RunConfig
    tensors: Tensors
    vision: Tensors = field(default_factory=dict)
    vision_config: dict[str, Any] | None = None
    allowed: Allowed = field(default_factory=Allowed)
    partial: bool = False


def stored_config(text: str, where: str) -> RunConfig:
    """A run's configuration from the JSON that lies beside its tensors; `where` names the file.

    Raises:
        CheckpointError: not JSON.
        ConfigError: a setting that is unknown or refused.
    """
    run: RunConfig = from_dict(RunConfig, stored_json(text, where), where)
    return run


def stored_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object that lies beside tensors.

    Raises:
        CheckpointError: not one.
    """
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: the configuration stored in it cannot be read")
    return values
