"""Captions and answers of a model that sees examples first.

    shots = [{"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}]
    model.ask(["dog.jpg"], "What is it?", shots=shots)

Shape letters: B images, K examples, Q queries, T text tokens, S tokens of the examples, H language-model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blip2.configs import DecodingConfig
from blip2.data.collection import BadSampleError
from blip2.data.few_shot import Shot, as_shot
from blip2.errors import ConfigError, DataError
from blip2.inference.types import Model
from blip2.models.language.interleave import interleave
from blip2.ops.devices import to_list

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

    def __init__(self, model: Model, shots: Sequence[ShotLike]) -> None:
        if model.stage2 is None:
            raise ConfigError("this run is stage 1 and has no language model: shots need a stage-2 run")
        self.model, self.stage2 = model, model.stage2
        self.shots = [_checked(number, shot) for number, shot in enumerate(shots, 1)]
        if not self.shots:
            raise ConfigError("shots is empty: give at least one example, or leave it out")

    @cached_property
    def embeds(self) -> Tensor:
        """All examples as one sequence [1, S, H], made when first needed.

        Raises:
            ConfigError: examples and answer are longer than the language model reads.
        """
        model, stage2, tokenizer = self.model, self.stage2, self.model.language_tokenizer
        language = model.config.language
        prompts = [language.prompt if s.question is None else language.question.format(s.question) for s in self.shots]
        with torch.no_grad():
            features_KPC = model.features([shot.image for shot in self.shots])
            soft = [
                model.soft_prompts(one[None], None if shot.question is None else [shot.question])
                for one, shot in zip(features_KPC, self.shots, strict=True)
            ]
            if stage2.language_model.encoder_decoder:
                texts = [f"{p} {s.text}".strip() for p, s in zip(prompts, self.shots, strict=True)]
                ids, mask = tokenizer.pairs(texts, [])[:2]
            else:
                ids, mask, _ = tokenizer.targets(prompts, [shot.text for shot in self.shots])
            ids, mask = ids.to(model.device), mask.to(model.device)
            joined = interleave(
                *(stage2.language_model, torch.cat(soft), ids, mask, torch.zeros_like(mask), len(self.shots)),
                front=tokenizer.front,
            )
        self._require_room(joined.embeds.shape[1])
        return joined.embeds

    def generate(
        self,
        features_BPC: Tensor,
        prompts: list[str],
        config: DecodingConfig,
        *,
        questions: Sequence[str] | None = None,
    ) -> list[list[str]]:
        """As `Blip2.generate`, with the examples in front: B lists of strings."""
        model, tokenizer = self.model, self.model.language_tokenizer
        with torch.no_grad():
            soft_BQH = model.soft_prompts(features_BPC, questions)
            ids, mask = (x.to(model.device) for x in tokenizer.prompts(prompts))
            if tokenizer.front:  # a sequence begins once, with the first example
                first = mask.cumsum(dim=1) <= tokenizer.front
                mask = mask & ~first
            out = self.stage2.language_model.generate(
                *(soft_BQH, ids, mask, config),
                end_id=tokenizer.end_id,
                pad_id=tokenizer.pad_id,
                examples_1SH=self.embeds,
            )
        texts = [tokenizer.decode(row) for row in to_list(out)]
        return [texts[n : n + config.num] for n in range(0, len(texts), config.num)]

    def _require_room(self, length: int) -> None:
        """Positions are learned or rotated up to a number that the model's config names, if any."""
        room = getattr(self.stage2.language_model.model.config, "max_position_embeddings", None)
        if room is not None and not self.stage2.language_model.encoder_decoder and length >= room:
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
