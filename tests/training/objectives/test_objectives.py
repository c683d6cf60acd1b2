"""The objectives against plain references that take one pair at a time: values and gradients.

Losses are in float32 by design: 1e-5 is its rounding over these sizes, 1e-4 that of gradients;
a wrong negative, target or average shows at 1e-2 and more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from blip2.configs import LanguageConfig, LossConfig
from blip2.data.batch import Batch
from blip2.models.freezing import freeze
from blip2.models.stage1 import Stage1
from blip2.models.vision.encoder import VisionEncoder
from blip2.training.objectives.common import drop_tokens
from blip2.training.objectives.stage1 import Stage1Objective
from blip2.training.objectives.stage2 import Stage2Objective, split_caption


def smoothed(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of one row against a distribution, with label smoothing."""
    target = (1 - smoothing) * target + smoothing / len(target)
    return -(target * logits.log_softmax(dim=0)).sum()


def draw(logits: Tensor, positive: list[bool], uniform: float) -> int:
    weights = [0.0 if p else math.exp(x) for x, p in zip(logits.tolist(), positive, strict=True)]
    left = uniform * sum(weights)
    for column, weight in enumerate(weights):
        left -= weight
        if weight and left < 0:
            return column
    return -1


def reference(
    model: Stage1, tokenizer: Any, batch: Batch, seed: int, step: int, *, one_sided: bool = False
) -> dict[str, Tensor]:
    """Stage 1 one image, one text and one pair at a time, all losses of weight 1 and smoothing 0.1."""
    assert batch.features is not None
    B, ids = len(batch), batch.image_ids.tolist()
    texts = [tokenizer([caption]) for caption in batch.captions]
    kvs = [model.project_image(feature[None]) for feature in batch.features]
    images = [model.embed_images(kv)[0][0] for kv in kvs]
    caches = [model.embed_images(kv)[1] for kv in kvs]
    words = [model.embed_texts(*text)[0] for text in texts]

    def cut(x: Tensor) -> Tensor:
        return x.detach() if one_sided else x

    i2t = torch.stack([torch.stack([(images[i] @ cut(words[j])).max() for j in range(B)]) for i in range(B)])
    t2i = torch.stack([torch.stack([(cut(images[j]) @ words[i]).max() for j in range(B)]) for i in range(B)])
    i2t, t2i = i2t / model.temp, t2i / model.temp

    itc = torch.zeros(())
    for i in range(B):
        target = torch.tensor([float(ids[i] == ids[j]) for j in range(B)])
        target = target / target.sum()
        itc = itc + (smoothed(i2t[i], target, 0.1) + smoothed(t2i[i], target, 0.1)) / (2 * B)

    uniforms = np.random.default_rng([seed, step]).random((2, B))
    pairs = [(i, i, 1) for i in range(B)]
    if len(set(ids)) > 1:
        for i in range(B):
            same = [ids[i] == ids[j] for j in range(B)]
            pairs.append((i, draw(i2t[i], same, uniforms[0, i]), 0))
            pairs.append((draw(t2i[i], same, uniforms[1, i]), i, 0))
    itm = torch.stack(
        [F.cross_entropy(model.match_logits(*texts[t], kvs[i]), torch.tensor([match])) for i, t, match in pairs]
    ).mean()

    tokens = []
    for i in range(B):
        row, mask = texts[i]
        row = row.clone()
        row[0, 0] = tokenizer.dec_id
        logits = model.qformer.decode_text(row, mask, caches[i], mask)
        tokens += [smoothed(logits[n], F.one_hot(row[0, n + 1], logits.shape[1]), 0.1) for n in range(len(logits) - 1)]
    return {"itc": itc, "itm": itm, "itg": torch.stack(tokens).mean()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], model: torch.nn.Module) -> None:
    """Same values of every loss, same gradients of each on every trained parameter."""
    assert set(got) == set(want)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    for loss in want:
        torch.testing.assert_close(got[loss], want[loss], rtol=1e-5, atol=1e-5, msg=lambda m, x=loss: f"{x}: {m}")
        mine = torch.autograd.grad(got[loss], parameters, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(want[loss], parameters, retain_graph=True, allow_unused=True)
        for (name, p), a, b in zip(named, mine, theirs, strict=True):
            a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, x=f"{loss} on {name}": f"{x}: {m}")


@pytest.mark.parametrize("image_ids", [[0, 1, 2, 3, 4, 5], [3, 1, 3, 1, 1, 0], [5, 5, 5], [2]])
def test_stage_1(tiny: Any, image_ids: list[int]) -> None:
    """All images different; some twice, whose pairs are no negatives of each other; one image only."""
    model, batch = tiny.stage1(), tiny.batch(len(image_ids), seed=1, image_ids=image_ids)
    got = Stage1Objective(model, tiny.tokenizer, LossConfig(), seed=7)(batch, 3)
    assert_same(got, reference(model, tiny.tokenizer, batch, 7, 3), model)


def test_one_sided_itc_has_the_same_value_and_lavis_gradients(tiny: Any) -> None:
    model, batch = tiny.stage1(), tiny.batch(5)
    got = Stage1Objective(model, tiny.tokenizer, LossConfig(itc_one_sided=True))(batch, 0)
    assert_same(got, reference(model, tiny.tokenizer, batch, 0, 0, one_sided=True), model)
    true = Stage1Objective(model, tiny.tokenizer, LossConfig())(batch, 0)
    torch.testing.assert_close(got["itc"], true["itc"])
    sides = [torch.autograd.grad(x["itc"], model.text_proj.weight)[0] for x in (got, true)]
    assert (sides[0] - sides[1]).abs().max() > 1e-3


def test_one_pair_is_finite_with_its_gradients(tiny: Any) -> None:
    model = tiny.stage1()
    losses = Stage1Objective(model, tiny.tokenizer, LossConfig())(tiny.batch(1), 0)
    assert losses["itc"].item() == pytest.approx(0, abs=1e-6)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_weights_scale_losses(tiny: Any) -> None:
    model, batch = tiny.stage1(), tiny.batch(4)
    plain = Stage1Objective(model, tiny.tokenizer, LossConfig())(batch, 0)
    scaled = Stage1Objective(model, tiny.tokenizer, LossConfig(itc=2.0, itm=0.5, itg=3.0))(batch, 0)
    for name, weight in {"itc": 2.0, "itm": 0.5, "itg": 3.0}.items():
        torch.testing.assert_close(scaled[name], weight * plain[name])


@pytest.mark.parametrize("left", [{"itc"}, {"itm"}, {"itg"}, {"itc", "itg"}])
def test_a_weight_of_zero_leaves_a_loss_out(tiny: Any, left: set[str]) -> None:
    model, batch = tiny.stage1(), tiny.batch(4)
    weights = {name: float(name in left) for name in ("itc", "itm", "itg")}
    losses = Stage1Objective(model, tiny.tokenizer, LossConfig(**weights))(batch, 0)
    assert set(losses) == left
    whole = Stage1Objective(model, tiny.tokenizer, LossConfig())(batch, 0)
    for name in left:
        torch.testing.assert_close(losses[name], whole[name])


def test_smoothing_comes_from_the_config(tiny: Any) -> None:
    model, batch = tiny.stage1(), tiny.batch(4)
    plain, hard = (
        Stage1Objective(model, tiny.tokenizer, LossConfig(itc_smoothing=s, itg_smoothing=s))(batch, 0)
        for s in (0.1, 0.0)
    )
    assert abs(plain["itc"] - hard["itc"]) > 1e-3
    assert abs(plain["itg"] - hard["itg"]) > 1e-3
    torch.testing.assert_close(plain["itm"], hard["itm"])


def test_negatives_are_a_pure_function_of_seed_and_step(tiny: Any) -> None:
    model, batch = tiny.stage1(), tiny.batch(8)
    config = LossConfig(itc=0, itg=0)
    losses = [Stage1Objective(model, tiny.tokenizer, config, seed)(batch, step)["itm"].item() for seed, step in
              [(0, 0), (0, 0), (0, 1), (1, 0)]]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("accumulate", [1, 3])
def test_hardness_rises_from_even_draws_to_the_papers(tiny: Any, accumulate: int) -> None:
    model, batch = tiny.stage1(), tiny.batch(8)

    def itm(step: int, **settings: float) -> float:
        config = LossConfig(itc=0, itg=0, **settings)
        return float(Stage1Objective(model, tiny.tokenizer, config, 0, accumulate)(batch, step)["itm"])

    ramp = 10
    assert itm(0, itm_ramp=ramp) == itm(0, itm_hardness=0.0)
    assert itm(5 * accumulate, itm_ramp=ramp) == itm(5 * accumulate, itm_hardness=0.5)
    for step in (ramp * accumulate, 2 * ramp * accumulate):
        assert itm(step, itm_ramp=ramp) == itm(step)
    assert len({itm(0, itm_hardness=value) for value in (0.0, 1.0, 50.0)}) > 1


def test_pixels_go_through_the_frozen_encoder(tiny: Any) -> None:
    dino = Dinov2Model(
        Dinov2Config(hidden_size=6, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    )
    vision = VisionEncoder(dino, width=6, size=28, patch=14)
    freeze(vision)
    model, batch = tiny.stage1(vision=vision), tiny.batch(3)
    pixels = torch.randn(3, 3, 28, 28)
    with_pixels = Batch(batch.keys, batch.image_ids, batch.captions, pixels=pixels)
    with_features = Batch(batch.keys, batch.image_ids, batch.captions, features=vision(pixels).clone())
    objective = Stage1Objective(model, tiny.tokenizer, LossConfig())
    assert_same(objective(with_pixels, 0), objective(with_features, 0), model)
    assert all(p.grad is None for p in vision.parameters())


def test_locked_text_stays_as_it_is_while_the_image_side_learns(tiny: Any) -> None:
    model, batch = tiny.stage1(), tiny.batch(3)
    model.qformer.lock_text()
    ids, mask = tiny.tokenizer(batch.captions)
    before = model.qformer.encode_text(ids, mask).detach()
    images = model.embed_images(model.project_image(batch.features))[0].detach()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"qformer.query_tokens", "text_proj.weight", "temp"} <= trained
    assert not any("self_attention" in name or "text_ff" in name or "embeddings" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = Stage1Objective(model, tiny.tokenizer, LossConfig(itm=0.0, itg=0.0))(batch, 0)
    losses["itc"].backward()
    optimizer.step()
    assert torch.equal(model.qformer.encode_text(ids, mask), before)
    assert not torch.allclose(model.embed_images(model.project_image(batch.features))[0], images)


def test_a_batch_without_images_is_refused(tiny: Any) -> None:
    batch = tiny.batch(2)
    batch.features = None
    for batch.pixels in (None, torch.zeros(2, 3, 4, 4)):  # the model is built without its encoder
        with pytest.raises(ValueError, match="needs features, or pixels and a model with its image encoder"):
            Stage1Objective(tiny.stage1(), tiny.tokenizer, LossConfig())(batch, 0)


@pytest.mark.parametrize("prompt", ["", "a dog"])
@pytest.mark.parametrize("size", [1, 4])
def test_stage_2_of_a_decoder_equals_transformers(tiny: Any, prompt: str, size: int) -> None:
    """Labels on the caption and its end only, as transformers counts them with -100 elsewhere."""
    model, batch = tiny.stage2("llama"), tiny.batch(size, seed=2)
    got = Stage2Objective(model, tiny.tokenizer, LanguageConfig(prompt=prompt))(batch, 0)
    llama = model.language_model.model
    prompts = model.soft_prompts(batch.features)
    ids, mask, labels = tiny.tokenizer.targets([prompt] * size, batch.captions)
    ignored = torch.full(prompts.shape[:2], -100)
    want = llama(
        inputs_embeds=torch.cat([prompts, llama.get_input_embeddings()(ids)], dim=1),
        attention_mask=torch.cat([torch.ones_like(ignored), mask], dim=1),
        labels=torch.cat([ignored, ids.masked_fill(~labels, -100)], dim=1),
    ).loss
    assert int(labels.sum()) == sum(len(caption.split()) + 1 for caption in batch.captions)
    assert_same(got, {"lm": want}, model)


@pytest.mark.parametrize("size", [1, 4])
def test_stage_2_of_an_encoder_decoder_equals_transformers(tiny: Any, size: int) -> None:
    """Prefix after the soft prompts in the encoder, suffix in the decoder, loss on the suffix."""
    model, batch = tiny.stage2("t5"), tiny.batch(size, seed=2)
    got = Stage2Objective(model, tiny.tokenizer, LanguageConfig(prompt="a dog"), seed=4)(batch, 9)
    t5 = model.language_model.model
    prompts = model.soft_prompts(batch.features)
    halves = [split_caption(caption, key, 4, 9) for caption, key in zip(batch.captions, batch.keys, strict=True)]
    heads, tails = [f"a dog {head}" for head, _ in halves], [tail for _, tail in halves]
    ids, mask, targets, real = tiny.tokenizer.pairs(heads, tails)
    want = t5(
        inputs_embeds=torch.cat([prompts, t5.get_input_embeddings()(ids)], dim=1),
        attention_mask=torch.cat([torch.ones(prompts.shape[:2]), mask], dim=1),
        labels=targets.masked_fill(~real, -100),
    ).loss
    assert_same(got, {"lm": want}, model)


def test_stage_2_trains_the_bridge_and_nothing_else(tiny: Any) -> None:
    model = tiny.stage2()
    Stage2Objective(model, tiny.tokenizer, LanguageConfig(prompt=""))(tiny.batch(3), 0)["lm"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("language_model."), name


def test_a_prompt_is_read_but_not_learned(tiny: Any) -> None:
    """The number of targets does not grow with the prompt, and the loss does depend on it."""
    model, batch = tiny.stage2(), tiny.batch(3)
    losses = [
        Stage2Objective(model, tiny.tokenizer, LanguageConfig(prompt=prompt))(batch, 0)["lm"]
        for prompt in ("a dog", "two men")
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


CAPTION = "two men on some old bikes"


def test_split_halves_join_to_the_caption() -> None:
    for step in range(50):
        prefix, suffix = split_caption(CAPTION, "key", 0, step)
        assert f"{prefix} {suffix}".strip() == CAPTION
        assert suffix


def test_split_reaches_every_word_evenly() -> None:
    """600 draws over 6 places: 100 each, within 5 standard deviations (9.1)."""
    places = [len(split_caption(CAPTION, "key", 0, step)[0].split()) for step in range(600)]
    counts = np.bincount(places, minlength=6)
    assert len(counts) == 6
    assert (abs(counts - 100) < 46).all()


def test_split_is_a_pure_function_of_seed_step_and_key() -> None:
    many = " ".join(str(n) for n in range(1000))
    assert split_caption(many, "a", 1, 2) == split_caption(many, "a", 1, 2)
    others = {split_caption(many, *args)[0] for args in [("a", 1, 2), ("b", 1, 2), ("a", 3, 2), ("a", 1, 3)]}
    assert len(others) == 4


@pytest.mark.parametrize(("caption", "halves"), [("dog", ("", "dog")), ("  dog ", ("", "dog")), ("", ("", ""))])
def test_split_of_short_captions(caption: str, halves: tuple[str, str]) -> None:
    assert split_caption(caption, "ключ", 0, 0) == halves


def test_dropped_tokens_are_others_for_every_image_and_cls_stays() -> None:
    torch.manual_seed(0)
    features = torch.arange(2 * 17.0).view(2, 17, 1).expand(-1, -1, 3)
    kept = drop_tokens(features, 0.5, prefix=1)
    assert kept.shape == (2, 9, 3)
    for image in range(2):
        numbers = kept[image, :, 0].tolist()
        assert numbers[0] == 17 * image
        assert len(set(numbers)) == 9
        assert set(numbers) <= set(features[image, :, 0].tolist())
    assert kept[0, :, 0].tolist() != (kept[1, :, 0] - 17).tolist()


def test_tokens_are_dropped_while_training_only(tiny: Any) -> None:
    batch = tiny.batch(2)
    objective = Stage1Objective(tiny.stage1(), tiny.tokenizer, LossConfig(itm=0.0), token_drop=0.4)
    seen: list[int] = []
    project = objective.model.project_image

    def project_image(features_BPC: torch.Tensor) -> Any:
        seen.append(features_BPC.shape[1])
        return project(features_BPC)

    objective.model.project_image = project_image  # type: ignore[method-assign]
    objective.train()(batch, 0)
    objective.eval()(batch, 0)
    assert seen == [3, 5]
