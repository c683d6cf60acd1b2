"""Stage 2 on sequences of pairs: what is learned, against one sequence at a time written out here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from blip2.configs import DataConfig, LanguageConfig, RunConfig, TrainConfig
from blip2.errors import ConfigError
from blip2.training.objectives.in_context import InContextObjective
from blip2.training.objectives.stage2 import Stage2Objective, split_caption

CONFIG = LanguageConfig(prompt="a", question="{}")


class Words:
    """The words of the shared tokenizer, which start with a [CLS] of their own, and no special front."""

    front = 0

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.targets, self.plain, self.end_id = inner.targets, inner.plain, inner.end_id

    def pairs(self, prefixes: list[str], suffixes: list[str]) -> tuple[torch.Tensor, ...]:
        nothing = torch.zeros(0, 0, dtype=torch.int64)
        encoder = self.inner.pairs(prefixes, prefixes)[:2] if prefixes else (nothing, nothing)
        decoder = self.inner.pairs(suffixes, suffixes)[2:] if suffixes else (nothing, nothing)
        return *encoder, *decoder


def test_no_shots_is_the_plain_objective(tiny: Any) -> None:
    model, batch = tiny.stage2(), tiny.batch(4)
    plain = Stage2Objective(model, tiny.tokenizer, CONFIG)(batch, 0)["lm"]
    single = InContextObjective(model, Words(tiny.tokenizer), CONFIG, shots=0)(batch, 0)["lm"]
    assert single.item() == pytest.approx(float(plain), abs=1e-6)


def test_every_text_is_learned_with_what_stands_before_it(tiny: Any) -> None:
    model, batch, words = tiny.stage2(), tiny.batch(6), Words(tiny.tokenizer)
    loss = InContextObjective(model, words, CONFIG, shots=2)(batch, 0)["lm"]
    soft = model.soft_prompts(batch.features)
    language, each = model.language_model, []
    for row in range(2):
        parts, places, place = [], [], 0
        for n in range(3 * row, 3 * row + 3):
            head, tail = [1, *words.plain("a")], [*words.plain(batch.captions[n]), 2]
            parts += [soft[n], language.embed(torch.tensor(head + tail))]
            place += len(soft[n]) + len(head)
            places += [(place + m, token) for m, token in enumerate(tail)]
            place += len(tail)
        logits = language.model(inputs_embeds=torch.cat(parts)[None]).logits[0]
        each += [F.cross_entropy(logits[at - 1], torch.tensor(token)) for at, token in places]
    assert loss.item() == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)
    loss.backward()
    assert float(model.qformer.query_tokens.grad.abs().max()) > 0


def test_several_texts_of_an_image_share_its_soft_prompts(tiny: Any) -> None:
    """Text n is about image n mod B: the sequences of the second round are of the same images."""
    model, words = tiny.stage2(), Words(tiny.tokenizer)
    objective = InContextObjective(model, words, CONFIG, shots=1)
    first, second = tiny.batch(4), tiny.batch(4, seed=1)
    second.features = first.features
    first.questions = second.questions = ["dog"] * 4
    both = replace(first, captions=first.captions + second.captions, questions=["dog"] * 8)
    sizes = [sum(len(words.plain(c)) + 1 for c in one.captions) for one in (first, second)]
    apart = [float(objective(one, 0)["lm"]) for one in (first, second)]
    mean = (apart[0] * sizes[0] + apart[1] * sizes[1]) / sum(sizes)
    assert float(objective(both, 0)["lm"]) == pytest.approx(mean, abs=1e-5)


def test_dev_losses_are_of_single_pairs(tiny: Any) -> None:
    model, batch = tiny.stage2(), tiny.batch(5)
    objective = InContextObjective(model, Words(tiny.tokenizer), CONFIG, shots=2).eval()
    plain = Stage2Objective(model, tiny.tokenizer, CONFIG)(batch, 0)["lm"]
    assert float(objective(batch, 0)["lm"]) == pytest.approx(float(plain), abs=1e-6)
    with pytest.raises(ConfigError, match="micro-batches of 5 pairs, which are no whole number of sequences of 3"):
        objective.train()(batch, 0)


def test_encoder_decoder_learns_the_rest_of_the_last_text(tiny: Any) -> None:
    model, batch, words = tiny.stage2("t5"), tiny.batch(4), Words(tiny.tokenizer)
    loss = InContextObjective(model, words, CONFIG, seed=7, shots=1)(batch, 3)["lm"]
    soft, language, each = model.soft_prompts(batch.features), model.language_model, []
    for row in range(2):
        first, last = 2 * row, 2 * row + 1
        head, tail = split_caption(batch.captions[last], batch.keys[last], 7, 3)
        texts = [[*words.plain(text), 2] for text in (f"a {batch.captions[first]}", f"a {head}".strip())]
        pieces = [
            x for n, t in zip((first, last), texts, strict=True) for x in (soft[n], language.embed(torch.tensor(t)))
        ]
        targets = torch.tensor([[*words.plain(tail), 2]])
        logits = language.model(inputs_embeds=torch.cat(pieces)[None], labels=targets).logits[0]
        each.append(F.cross_entropy(logits, targets[0], reduction="none"))
    assert loss.item() == pytest.approx(float(torch.cat(each).mean()), abs=1e-5)


def test_settings() -> None:
    with pytest.raises(ConfigError, match="data.shots is 2: it must be 0 in stage 1"):
        RunConfig(data=DataConfig(shots=2))
    with pytest.raises(ConfigError, match="train.batch is 64: it must be a multiple of .*shots \\+ 1 = 3"):
        RunConfig(stage="stage2", data=DataConfig(shots=2))
    assert (
        RunConfig(stage="stage2", data=DataConfig(shots=2), train=TrainConfig(batch=12, accumulate=2)).data.shots == 2
    )
