"""Objectives: batch in, named losses out. A new one is a file here and a branch of `build_objective`."""

from __future__ import annotations

from torch import nn

from blip2.configs import RunConfig
from blip2.inference import Blip2
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.training.objectives.common import EarlyBackward
from blip2.training.objectives.in_context import InContextObjective
from blip2.training.objectives.stage1 import Stage1Objective
from blip2.training.objectives.stage2 import Stage2Objective


def build_objective(config: RunConfig, model: Stage1 | Stage2, user: Blip2, *, sharded: bool = False) -> nn.Module:
    """What a run trains on: a module that maps (batch, step) to losses by name.

    Args:
        user: the model as its users have it, with its tokenizers.
        sharded: by FSDP2, which would gather the language model anew for every piece of a batch.
    """
    seed, token_drop, shots = config.train.seed, config.vision.token_drop, config.data.shots
    if isinstance(model, Stage1):
        text_tokenizer, accumulate = user.text_tokenizer, config.train.accumulate
        stage1 = Stage1Objective(model, text_tokenizer, config.loss, seed, accumulate, token_drop)
        return EarlyBackward(stage1) if config.train.early_backward else stage1
    parts = (model, user.language_tokenizer, config.language, seed, user.instruction_reader, token_drop)
    if shots:
        return InContextObjective(*parts, shots=shots)
    stage2 = Stage2Objective(*parts)
    return EarlyBackward(stage2) if config.train.early_backward and not sharded else stage2
