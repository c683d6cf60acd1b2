"""LoRA on a frozen language model: the formula, what trains, what stays frozen, merging."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, GPT2Config, LlamaConfig, OPTConfig, T5Config

from blip2.configs import DecodingConfig, LoraConfig
from blip2.errors import ConfigError, RunError
from blip2.models.freezing import assert_frozen, is_adapter, parameter_table, weights_digest
from blip2.models.language.model import LanguageModel, language_model_from_config

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'blip2[train]')")

from blip2.models.language.lora import add_lora, merge_lora  # noqa: E402 - after the skip

V, H = 29, 16
LLAMA: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_dropout": 0.3,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA),
    "opt": OPTConfig(
        vocab_size=V,
        hidden_size=H,
        word_embed_proj_dim=H,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.3,
    ),
    "gpt2": GPT2Config(vocab_size=V, n_embd=H, n_layer=2, n_head=2, n_positions=64),
    "cohere": CohereConfig(**LLAMA),
    "t5": T5Config(vocab_size=V, d_model=H, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0),
}
# Layers that get an adapter by default, and what they end in: peft's table, worked out for two blocks.
DEFAULTS = {
    "llama": (4, {"q_proj", "v_proj"}),
    "opt": (4, {"q_proj", "v_proj"}),
    "gpt2": (2, {"c_attn"}),
    "cohere": (14, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    "t5": (12, {"q", "v"}),
}


def base(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    model = language_model_from_config(copy.deepcopy(CONFIGS[kind]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def adapted(kind: str, *, start: bool = False, dtype: torch.dtype | None = None, **settings: Any) -> LanguageModel:
    """A model with adapters; unless it is to be at its start, they change what it says."""
    model = base(kind)
    if dtype is not None:
        model.to(dtype)
    add_lora(model, LoraConfig(**{"rank": 3, "alpha": 6.0} | settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name) and not start:
                p.copy_(0.3 * torch.randn_like(p))
    return model


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if is_adapter(name)}


def layers(model: LanguageModel) -> set[str]:
    """Names of the adapted layers, as they were before."""
    return {name.split(".lora_")[0] for name in adapters(model.model)}


def loss(model: LanguageModel, prompt: Tensor | None = None) -> Tensor:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (2, 6), generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    random = torch.randn(2, 3, H, generator=g)
    prompt = random if prompt is None else prompt
    if model.encoder_decoder:
        return model.encoder_decoder_loss(prompt, ids, mask, ids.flip(0), mask.flip(0))
    return model.decoder_loss(prompt, ids, mask, mask.bool() & (torch.arange(6) >= 2))


def merged_by_hand(kind: str, model: LanguageModel, scale: float) -> LanguageModel:
    """The same model without adapters, each adapted weight being W + scale * B A."""
    plain = base(kind)
    parts = adapters(model.model)
    with torch.no_grad():
        for layer in layers(model):
            delta = parts[f"{layer}.lora_B.default.weight"] @ parts[f"{layer}.lora_A.default.weight"]
            weight = plain.model.get_submodule(layer).weight
            weight += scale * (delta if weight.shape == delta.shape and kind != "gpt2" else delta.T)
    return plain


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_start_as_no_change_on_the_layers_that_suit_the_model(kind: str) -> None:
    model = adapted(kind, start=True)
    torch.testing.assert_close(loss(model), loss(base(kind)), rtol=0, atol=0)
    count, names = DEFAULTS[kind]
    assert len(layers(model)) == count
    assert {layer.rsplit(".", 1)[-1] for layer in layers(model)} == names
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapters(model))
    shapes = {p.shape[0] if "lora_A" in name else p.shape[1] for name, p in adapters(model).items()}
    assert shapes == {3}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_formula(kind: str) -> None:
    """y = (W + alpha / rank * B A) x, on the path that runs the head at targets only and on the other."""
    model = adapted(kind)
    plain = merged_by_hand(kind, model, scale=2.0)
    torch.testing.assert_close(loss(model), loss(plain), rtol=1e-5, atol=1e-5)
    assert (loss(model) - loss(base(kind))).abs() > 1e-3
    prompt, nothing = torch.randn(2, 3, H), torch.zeros(2, 0, dtype=torch.int64)
    data = (prompt, nothing, nothing, DecodingConfig(beams=2, min_tokens=5, max_tokens=5))
    assert torch.equal(model.generate(*data, end_id=2, pad_id=0), plain.generate(*data, end_id=2, pad_id=0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_merging_leaves_the_plain_model_with_the_same_answers(kind: str) -> None:
    model = adapted(kind)
    before = loss(model)
    merge_lora(model)
    plain = merged_by_hand(kind, adapted(kind), scale=2.0)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss(model), before, rtol=1e-5, atol=1e-5)
    assert type(model.model) is type(plain.model)
    assert_frozen(model)
    merge_lora(model)  # a second time there is nothing to merge
    torch.testing.assert_close(loss(model), before, rtol=1e-5, atol=1e-5)


def test_adapters_are_float32_on_any_weights_and_merging_rounds_once() -> None:
    model = adapted("llama", dtype=torch.bfloat16)
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    layer = model.model.model.layers[0].self_attn.q_proj
    weight, delta = layer.base_layer.weight.clone(), 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert weight.dtype == torch.bfloat16
    merge_lora(model)
    assert torch.equal(model.model.model.layers[0].self_attn.q_proj.weight, (weight.float() + delta).bfloat16())


def test_targets() -> None:
    assert layers(adapted("llama", targets="o_proj, layers.1.mlp.up_proj")) == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
    }
    adapted_layers = layers(adapted("opt", targets="all-linear"))
    assert len(adapted_layers) == 12
    assert not any("head" in layer for layer in adapted_layers)
    for wrong in ("q_prj", "q_proj,lm_head", "proj", "embed_tokens"):
        with pytest.raises(ConfigError, match=rf"lora.targets is '{wrong}': this llama has no .* has q_proj, k_proj"):
            adapted("llama", targets=wrong)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_dropout_is_on_in_the_adapters_alone_while_training(kind: str) -> None:
    quiet, noisy = adapted(kind), adapted(kind, dropout=0.5)
    expected = loss(quiet)
    for model in (quiet, noisy):
        assert not model.train().training
        assert not model.model.training
    torch.testing.assert_close(loss(quiet), expected, rtol=0, atol=0)  # the model's own dropout is 0.3
    assert len({loss(noisy).item() for _ in range(3)}) == 3
    torch.testing.assert_close(loss(noisy.eval()), expected)
    assert not any(module.training for module in noisy.modules())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradient_checkpointing_recomputes_the_same(kind: str) -> None:
    """Dropout in the adapters included: the second run of a block draws what the first drew."""
    results = []
    for on in (False, True):
        model = adapted(kind, dropout=0.5).train()
        model.gradient_checkpointing = on
        prompt = torch.ones(2, 3, H, requires_grad=True)
        torch.manual_seed(3)
        value = loss(model, prompt)
        value.backward()
        results.append([value.detach(), prompt.grad, *(p.grad for p in adapters(model).values())])
    torch.testing.assert_close(results[0], results[1])
    assert all(x.abs().sum() > 0 for x in results[0])


def test_the_head_still_runs_at_targets_only() -> None:
    model, rows = adapted("llama"), []
    model.model.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    loss(model)
    assert rows == [4 + 2]


def test_a_step_moves_adapters_and_nothing_else() -> None:
    model = adapted("opt").train()
    before, digest = {name: p.detach().clone() for name, p in adapters(model).items()}, weights_digest(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = loss(model)
    first.backward()
    assert_frozen(model)
    optimizer.step()
    assert weights_digest(model) == digest
    assert all(not torch.equal(p, before[name]) for name, p in adapters(model).items())
    assert loss(model) < first
    assert model.frozen


def test_a_base_weight_that_trains_is_found_under_adapters() -> None:
    model = adapted("llama")
    weight = model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    digest = weights_digest(model)
    weight.requires_grad_(True)
    assert not model.frozen
    with pytest.raises(RunError, match="self_attn.q_proj.base_layer.weight requires a gradient"):
        assert_frozen(model, "language model")
    with torch.no_grad():
        weight[0, 0] += 1
    assert weights_digest(model) != digest


def test_the_table_counts_both() -> None:
    model = adapted("llama")
    (row,) = parameter_table(model)
    assert row.trainable == 4 * 3 * (H + H)  # query and value of two blocks
    assert row.frozen == sum(p.numel() for p in base("llama").parameters())


def test_without_peft_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora.rank is 3: LoRA needs peft: pip install 'blip2\[train\]'") as caught:
        adapted("llama")
    assert "\n" not in str(caught.value)
