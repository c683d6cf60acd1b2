"""Samples of one, two and three images in one batch: the loss and the gradients of each by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config

from blip2.configs import LanguageConfig
from blip2.data.batch import Batch
from blip2.data.tokenizers import InstructionReader
from blip2.errors import ConfigError, DataError
from blip2.models.language.model import language_model_from_config
from blip2.models.stage2 import Stage2
from blip2.training.objectives.common import EarlyBackward
from blip2.training.objectives.in_context import InContextObjective
from blip2.training.objectives.stage2 import Stage2Objective

COUNTS = [1, 3, 2, 1, 3, 2]
CONFIG = LanguageConfig(prompt="a dog", question="two {}")


class Marked:
    """The tests' tokenizer, with words in front of images and as many tokens in front as it puts there."""

    front = 1

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.pairs, self.targets = inner.pairs, inner.targets

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids: tuple[Tensor, Tensor] = self.inner(texts)
        return ids

    def marks(self, template: str, images: int) -> list[Tensor]:
        return [torch.tensor(self.inner.plain("some " * n + template)) for n in range(images)]


def model_of(tiny: Any, kind: str, *, reads: bool, places: int = 0) -> Stage2:
    model: Stage2 = tiny.stage2("t5" if kind == "t5" else "llama")
    language = model.language_model
    if kind == "gpt2":  # positions counted from the first column, padding or not
        sizes = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
        language = language_model_from_config(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    model = Stage2(tiny.qformer(text=reads), language, places=places)
    if model.image_places is not None:
        nn.init.normal_(model.image_places)
    return model


def batch_of(tiny: Any, texts: int = 1) -> Batch:
    base = tiny.batch(len(COUNTS), seed=3)
    features = torch.randn(sum(COUNTS), *base.features.shape[1:])
    captions = [caption for n in range(texts) for caption in tiny.batch(len(COUNTS), seed=3 + n).captions]
    questions = ["" if n % 3 == 0 else "green grass" if n % 3 == 1 else "men" for n in range(len(captions))]
    return replace(base, features=features, captions=captions, questions=questions, images=COUNTS)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("reads", [None, "prompt"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_each_sample_as_by_itself(tiny: Any, kind: str, reads: str | None, texts: int, early: bool) -> None:
    model, batch = model_of(tiny, kind, reads=reads is not None, places=3), batch_of(tiny, texts)
    reader = None if reads is None else InstructionReader(tiny.tokenizer, reads)
    config = replace(CONFIG, image_mark="near")
    objective = Stage2Objective(model, Marked(tiny.tokenizer), config, 4, reader)
    whole = (EarlyBackward(objective) if early else objective)(batch, 9)["lm"]
    whole.backward()
    together = gradients(model)
    losses, weights = [], []
    for n in range(len(COUNTS)):
        own = batch._slice(slice(n, n + 1), first=True)
        assert own.features is not None
        assert len(own.features) == COUNTS[n]
        losses.append(objective(own, 9)["lm"])
        weights.append(int(objective.inputs(own, 9)[-1].sum()))
    want = torch.stack([loss * weight for loss, weight in zip(losses, weights, strict=True)]).sum() / sum(weights)
    torch.testing.assert_close(whole.detach(), want.detach(), rtol=1e-5, atol=1e-6)
    want.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_samples_of_equally_many_images_have_no_padding(tiny: Any) -> None:
    model = model_of(tiny, "llama", reads=False)
    batch = replace(batch_of(tiny), images=[2] * len(COUNTS), features=torch.randn(12, 5, 6))
    soft, real, *_ = Stage2Objective(model, tiny.tokenizer, CONFIG).inputs(batch, 0)
    assert (soft.shape[1], real.shape[1]) == (2 * 3, 0)


def test_micro_batches_take_their_images_along(tiny: Any) -> None:
    batch = batch_of(tiny, 2)
    assert batch.features is not None
    parts = batch.split(3)
    assert [part.images for part in parts] == [[1, 3], [2, 1], [3, 2]]
    assert torch.equal(torch.cat([part.features for part in parts if part.features is not None]), batch.features)


def test_what_cannot_be_is_refused(tiny: Any) -> None:
    model = model_of(tiny, "gpt2", reads=False)
    batch = replace(batch_of(tiny), images=[1, 1, 1, 1, 1, 30], features=torch.randn(35, 5, 6))
    with pytest.raises(DataError, match=r"photo3-5: 30 images and their text are \d+ tokens, .* reads 64: fewer"):
        Stage2Objective(model, tiny.tokenizer, CONFIG)(batch, 0)
    shots = InContextObjective(model, Marked(tiny.tokenizer), CONFIG, shots=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.shots: samples of several images"):
        shots(batch_of(tiny), 0)
