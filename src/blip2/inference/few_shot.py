"""Captions and answers of a model that sees examples first.

    shots = [{"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}]
    model.ask(["dog.jpg"], "What is it?", shots=shots)

Shape letters: K examples, P patches, C image-encoder channels, Q queries, T text tokens, S tokens of the examples,
H language-model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blip2.data.collection import BadSampleError
from blip2.data.few_shot import Shot, as_shot
from blip2.errors import ConfigError, DataError
from blip2.models.language.interleave import interleave
from blip2.weights.loaded import LoadedModel

ShotLike = Shot | Mapping[str, Any]


class Examples:
    """K examples in front of every image that is captioned or asked about.

    Each is an image's soft prompts, its prompt (the run's, or its question) and its text with the end
    token, as stage 2 trains a pair, so that the last thing in a sequence is what is to be continued.

    Args:
        model: a stage-2 model.
        shots: in the order in which they are read; mappings hold `image` and `caption`, or `image`,
            `question` and `answer`.

    Raises:
        ConfigError: no stage 2; an example without its texts.
    """

    def __init__(self, model: LoadedModel, shots: Sequence[ShotLike]) -> None:
        if model.stage2 is None:
            raise ConfigError("this run is stage 1 and has no language model: shots need a stage-2 run")
        self.model, self.language_model = model, model.stage2.language_model
        self.shots = [_checked(number, shot) for number, shot in enumerate(shots, 1)]
        if not self.shots:
            raise ConfigError("shots is empty: give at least one example, or leave it out")

    @cached_property
    def embeds(self) -> Tensor:
        """All examples as one sequence [1, S, H], made when first needed.

        Raises:
            ConfigError: examples and answer are longer than the language model reads.
        """
        model, tokenizer, shots = self.model, self.model.language_tokenizer, self.shots
        settings = model.config.language
        prompts = [settings.prompt if s.question is None else settings.question.format(s.question) for s in shots]
        features_KPC = model.features([shot.image for shot in shots])
        soft_KQH = torch.cat(
            [
                model.soft_prompts(
                    features_KPC[n : n + 1], None if shot.question is None else [shot.question], prompts=[prompts[n]]
                )
                for n, shot in enumerate(shots)
            ]
        )
        if self.language_model.encoder_decoder:
            texts = [f"{prompt} {shot.text}".strip() for prompt, shot in zip(prompts, shots, strict=True)]
            ids_KT, mask_KT = tokenizer.pairs(texts, [])[:2]
        else:
            ids_KT, mask_KT, _ = tokenizer.targets(prompts, [shot.text for shot in shots])
        ids_KT, mask_KT = ids_KT.to(model.device), mask_KT.to(model.device)
        with torch.no_grad():
            embeds: Tensor = interleave(
                *(self.language_model, soft_KQH, ids_KT, mask_KT, torch.zeros_like(mask_KT), len(shots)),
                front=tokenizer.front,
            ).embeds
        self._require_room(embeds.shape[1])
        return embeds

    def _require_room(self, length: int) -> None:
        room = self.language_model.room
        if room is not None and length >= room:
            raise ConfigError(
                f"{len(self.shots)} shots are {length} tokens, and the language model reads {room}: give fewer"
            )


def _checked(number: int, shot: ShotLike) -> Shot:
    if isinstance(shot, Shot):
        return shot
    try:
        return as_shot(dict(shot))
    except BadSampleError as error:
        raise DataError(f"shot {number}: {error.reason}") from error
