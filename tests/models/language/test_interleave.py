"""Sequences of several images and texts against the same built by hand, one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, OPTConfig, T5Config

from blip2.configs import DecodingConfig
from blip2.models.language.interleave import interleave, interleaved_loss
from blip2.models.language.model import LanguageModel, language_model_from_config

Q, H = 3, 16
LENGTHS = [4, 2, 5, 1, 3, 6]


def language_model(kind: str) -> LanguageModel:
    shared: dict[str, Any] = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "t5":
        sizes = {"d_model": H, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        return language_model_from_config(T5Config(**shared, **sizes))
    sizes = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "opt":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": H, "max_position_embeddings": 64}
        return language_model_from_config(OPTConfig(**shared, **sizes, init_std=0.3))
    return language_model_from_config(LlamaConfig(**shared, **sizes, intermediate_size=24, initializer_range=0.3))


def segments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Soft prompts, ids, mask and labels of six segments; the first token of each is not learned."""
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(4, 24, mask.shape, generator=g).masked_fill(~mask, 0)
    labels = mask.clone()
    labels[:, 0] = False
    return torch.randn(6, Q, H, generator=g), ids, mask, labels


def by_hand(model: LanguageModel, row: int, length: int, front: int = 0) -> tuple[Tensor, list[tuple[int, int]]]:
    """Embeddings [S, H] of one sequence, and (place, token) of all that is learned in it."""
    soft, ids, mask, labels = segments()
    parts: list[Tensor] = []
    learned: list[tuple[int, int]] = []
    place = 0
    for k in range(length):
        n = row * length + k
        parts.append(soft[n])
        place += Q
        for t in range(int(mask[n].sum())):
            if k and t < front:
                continue
            parts.append(model.embed(ids[n, t][None]))
            if labels[n, t]:
                learned.append((place, int(ids[n, t])))
            place += 1
    return torch.cat(parts), learned


@pytest.mark.parametrize("front", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_order_and_labels(length: int, front: int) -> None:
    model = language_model("llama")
    made = interleave(model, *segments(), length, front=front)
    assert made.embeds.shape[0] == 6 // length
    longest = 0
    for row in range(6 // length):
        expected, learned = by_hand(model, row, length, front)
        S = len(expected)
        longest = max(longest, S)
        torch.testing.assert_close(made.embeds[row, :S], expected)
        assert made.mask[row].tolist() == [1] * S + [0] * (made.mask.shape[1] - S)
        assert [(p, int(made.ids[row, p])) for p in made.labels[row].nonzero()[:, 0].tolist()] == learned
    assert made.embeds.shape[1] == longest


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("length", [1, 3])
def test_loss_is_that_of_plain_rows(kind: str, length: int) -> None:
    """A mean over all tokens, each predicted at the place before it; gradients to the soft prompts too."""
    model = language_model(kind)
    soft, ids, mask, labels = segments()
    soft.requires_grad_()
    loss = interleaved_loss(model, interleave(model, soft, ids, mask, labels, length))
    loss.backward()
    assert soft.grad is not None
    each = []
    for row in range(6 // length):
        embeds, learned = by_hand(model, row, length)
        logits = model.model(inputs_embeds=embeds[None]).logits[0]
        each += [F.cross_entropy(logits[place - 1], torch.tensor(token)) for place, token in learned]
    assert loss.item() == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)
    assert all(float(row.abs().max()) > 0 for row in soft.grad[:3])


def test_one_segment_is_the_decoder_loss() -> None:
    model = language_model("opt")
    parts = segments()
    loss = interleaved_loss(model, interleave(model, *parts, 1, front=1))
    assert loss.item() == pytest.approx(float(model.decoder_loss(*parts)), abs=1e-6)


def test_an_example_changes_the_loss_of_what_follows_only() -> None:
    model = language_model("llama")
    soft, ids, mask, labels = segments()
    before = interleave(model, soft, ids, mask, labels, 3)
    soft[1] += 1
    after = interleave(model, soft, ids, mask, labels, 3)

    def losses(made: Any) -> Tensor:
        at = torch.zeros_like(made.labels)
        at[:, :-1] = made.labels[:, 1:]
        return model.losses_at(made.embeds, made.mask, at, made.ids[made.labels])

    changed = (losses(before) - losses(after)).abs() > 1e-6
    counts = labels.sum(dim=1).tolist()
    assert changed.tolist() == [False] * counts[0] + [True] * sum(counts[1:3]) + [False] * sum(counts[3:])


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_after_examples(kind: str, beams: int) -> None:
    """Examples read once for three images write what transformers writes after the whole sequence."""
    model = language_model(kind)
    soft, ids, mask, _ = segments()
    nothing = torch.zeros_like(mask)
    examples = interleave(model, soft[:3], ids[:3], mask[:3], nothing[:3], 3)
    config = DecodingConfig(beams=beams, min_tokens=2, max_tokens=5)
    made = model.generate(soft[3:], ids[3:], mask[3:], config, end_id=2, pad_id=0, examples_1SH=examples.embeds)
    for row in range(3):
        text = model.embed(ids[3 + row, : LENGTHS[3 + row]])
        sequence = torch.cat([examples.embeds[0], soft[3 + row], text])[None]
        options: dict[str, Any] = {"num_beams": beams, "do_sample": False, "min_new_tokens": 2, "max_new_tokens": 5}
        ones = torch.ones(sequence.shape[:2], dtype=torch.int64)
        expected = model.model.generate(inputs_embeds=sequence, attention_mask=ones, pad_token_id=0, **options)[0]
        expected = expected[1:] if kind == "t5" else expected
        assert made[row, : len(expected)].tolist() == expected.tolist()
        assert set(made[row, len(expected) :].tolist()) <= {0, 2}
