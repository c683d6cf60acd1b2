"""Early backward passes give the losses and gradients of one backward pass over the sum, and hold less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip2.configs import LanguageConfig, LossConfig
from blip2.training.objectives import stage2
from blip2.training.objectives.common import EarlyBackward, add_up
from blip2.training.objectives.stage1 import Stage1Objective
from blip2.training.objectives.stage2 import Stage2Objective


def gradients(model: nn.Module, losses: dict[str, Tensor], *others: Tensor, factor: float = 1.0) -> list[Tensor | None]:
    """Of the sum times a factor, as the trainer asks for them."""
    (torch.stack(list(losses.values())).sum() * factor).backward()
    grads = [x.grad for x in (*model.parameters(), *others)]
    model.zero_grad()
    for x in others:
        x.grad = None
    return grads


class TwoParts(nn.Module):
    """Two parts that share a tensor and the name of a loss."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second", "unused", "frozen")})
        self.model["frozen"].requires_grad_(False)
        self.x, self.with_graph = x, []

    def inputs(self, batch: Any, step: int) -> list[Tensor]:
        return [torch.tanh(self.x), torch.ones(4)]

    def parts(self, batch: Any, step: int, inputs: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        shared, plain = inputs
        self.with_graph.append(plain.requires_grad)
        hidden = self.model["first"](shared)
        yield {"a": hidden.square().mean(), "b": (hidden * plain).mean()}
        yield {"b": self.model["second"](self.model["frozen"](shared)).square().sum()}

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        return add_up(self.parts(batch, step, self.inputs(batch, step)))


def test_parts_that_share_tensors_and_a_name() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    objective = TwoParts(x)
    plain, early = objective(None, 0), EarlyBackward(objective)(None, 0)
    assert list(early) == ["a", "b"]
    assert objective.with_graph == [False, False]
    torch.testing.assert_close(early, plain)
    wanted, got = (gradients(objective.model, losses, x, factor=0.25) for losses in (plain, early))
    assert [g is None for g in got] == [g is None for g in wanted]
    torch.testing.assert_close([g for g in got if g is not None], [g for g in wanted if g is not None])


@pytest.mark.parametrize(
    "config",
    [LossConfig(), LossConfig(itc=0.5, itm=2.0, itg=3.0), LossConfig(itc=0.0, itg=0.0), LossConfig(itm=0.0)],
    ids=["all", "weighted", "itm", "no-itm"],
)
@pytest.mark.parametrize("image_ids", [[0, 1, 2, 3, 4], [3, 1, 3, 1, 0], [2]])
def test_stage_1(tiny: Any, config: LossConfig, image_ids: list[int]) -> None:
    """All parameters, and features of an encoder that trains; `[2]` has no negatives."""
    model, batch = tiny.stage1(), tiny.batch(len(image_ids), seed=1, image_ids=image_ids)
    features = batch.features.clone().requires_grad_()
    batch.features = features

    def step(early: bool) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        objective = Stage1Objective(model, tiny.tokenizer, config, seed=7)
        losses = (EarlyBackward(objective) if early else objective).train()(batch, 3)
        kept = {name: value.detach().clone() for name, value in losses.items()}
        return kept, gradients(model, losses, features, factor=0.5)

    (plain, wanted), (early, got) = step(False), step(True)
    torch.testing.assert_close(early, plain)
    assert sum(g is not None and bool(g.any()) for g in wanted) > 10
    for a, b in zip(got, wanted, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-4, atol=1e-6)


def test_autocast_and_checkpointed_layers(tiny: Any) -> None:
    """As near to float32 as one backward pass is, and in float32; layers that run again find their stand-ins."""
    model, batch = tiny.stage1(), tiny.batch(4)
    model.qformer.gradient_checkpointing = True

    def step(early: bool, bf16: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            objective = Stage1Objective(model, tiny.tokenizer, LossConfig())
            losses = (EarlyBackward(objective) if early else objective).train()(batch, 0)
        grads = [g for g in gradients(model, losses) if g is not None]
        assert {g.dtype for g in grads} == {torch.float32}
        return torch.cat([g.flatten() for g in grads])

    true = step(early=False, bf16=False)
    torch.testing.assert_close(step(early=True, bf16=False), true, rtol=1e-4, atol=1e-5)
    off, wanted = ((step(early, bf16=True) - true).norm() for early in (True, False))
    assert 0 < off < 1.2 * wanted < 0.1 * true.norm()


def test_without_gradients_nothing_runs_backward(tiny: Any) -> None:
    model, batch = tiny.stage1(), tiny.batch(3)
    objective = EarlyBackward(Stage1Objective(model, tiny.tokenizer, LossConfig(itc=2.0)))
    with torch.no_grad():
        dev = objective(batch, 0)
    torch.testing.assert_close(dev, {name: value.detach() for name, value in objective(batch, 0).items()})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("texts_per_image", [1, 3])
def test_stage_2(tiny: Any, monkeypatch: pytest.MonkeyPatch, kind: str, texts_per_image: int) -> None:
    """The language model in four uneven pieces: loss and gradients of the bridge, and of features that train."""
    monkeypatch.setitem(stage2.ENOUGH_TOKENS, "cpu", 1)
    model, batch = tiny.stage2(kind), tiny.batch(6, seed=2)
    words = ["a", "a dog", "a dog runs through a dog", "a runs", "a dog a dog a dog a dog", "through"]
    batch.captions = [words[(n + k) % 6] for k in range(texts_per_image) for n in range(6)]
    features = batch.features.clone().requires_grad_()
    batch.features = features
    read: list[int] = []
    name = "encoder_decoder_loss" if kind == "t5" else "decoder_loss"
    whole = getattr(model.language_model, name)
    monkeypatch.setattr(
        model.language_model, name, lambda p, *rest, **more: (read.append(len(p)), whole(p, *rest, **more))[1]
    )

    def step(early: bool) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        config = LanguageConfig(prompt="a dog")
        objective = Stage2Objective(model, tiny.tokenizer, config, seed=7)
        losses = (EarlyBackward(objective) if early else objective).train()(batch, 3)
        kept = {name: value.detach().clone() for name, value in losses.items()}
        return kept, gradients(model, losses, features, factor=0.5)

    (plain, wanted), (early, got) = step(False), step(True)
    times = texts_per_image if kind == "t5" else 1
    assert read == [6 * times, times, times, 2 * times, 2 * times]  # long texts first, one image less of them
    torch.testing.assert_close(early, plain)
    assert [g is None for g in got] == [g is None for g in wanted]
    assert sum(g is not None and bool(g.any()) for g in wanted) > 10
    for a, b in zip(got, wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_pieces_have_images_with_their_texts_and_no_empty_columns() -> None:
    mask = torch.arange(6) < torch.tensor([5, 2, 3, 1, 2, 6, 1, 2])[:, None]  # two texts of four images
    ids = torch.arange(8)[:, None] * mask
    pieces = stage2.in_pieces((ids, mask, mask), images=4, pieces=2)
    assert [images.tolist() for images, _ in pieces] == [[0, 1], [3, 2]]
    assert [texts[0][:, 0].tolist() for _, texts in pieces] == [[0, 1, 4, 5], [3, 2, 7, 6]]
    assert [texts[0].shape[1] for _, texts in pieces] == [6, 3]
    even = stage2.in_pieces((ids, mask, mask), images=4, pieces=2, even=True)
    assert [images.tolist() for images, _ in even] == [[0, 1], [2, 3]]
    assert {texts[0].shape[1] for _, texts in even} == {6}


def test_small_batches_stay_whole() -> None:
    counts = [stage2.piece_count(n, 46 * n, cpu=cpu) for cpu in (True, False) for n in (1, 2, 8, 30, 60, 200)]
    assert counts == [1, 1, 4, 4, 4, 4, 1, 1, 1, 1, 2, 4]
