"""Quantized language models: what is quantized, that gradients pass, what it weighs, and who is refused."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, LlamaConfig, OPTConfig, T5Config

from blip2.configs import DecodingConfig, LanguageConfig, LoraConfig, RunConfig, TrainConfig
from blip2.errors import ConfigError
from blip2.models.freezing import assert_frozen, parameter_table, weights_digest
from blip2.models.language import quantize
from blip2.models.language.model import LanguageModel, language_model_from_config, load_language_model

V, H = 40, 64
CPU = torch.device("cpu")
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    ),
    "opt": OPTConfig(
        vocab_size=V,
        hidden_size=H,
        word_embed_proj_dim=H,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),
    "t5": T5Config(vocab_size=V, d_model=H, d_kv=32, d_ff=128, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "gpt2": GPT2Config(vocab_size=V, n_embd=H, n_layer=1, n_head=2),
}


def library(kind: str) -> Any:
    """Skips where the library that quantizes so on a CPU is not installed."""
    name = quantize.LIBRARIES[kind, "cpu"]
    return pytest.param(kind, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed"))


KINDS = [library("int8"), library("nf4")]


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a model of random weights, large enough to matter."""
    kind = getattr(request, "param", "llama")
    torch.manual_seed(0)
    model = language_model_from_config(copy.deepcopy(CONFIGS[kind]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.model.save_pretrained(tmp_path / kind)
    return tmp_path / kind


def load(folder: Path, kind: str | None = None) -> LanguageModel:
    return load_language_model(LanguageConfig(name=str(folder), quantize=kind), torch.float32)


def quantized(model: nn.Module) -> dict[str, nn.Linear]:
    """Quantized layers of a transformers model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and quantize.is_quantized(m.weight)}


def floats(module: nn.Linear) -> Tensor:
    """The weight that a quantized layer stands for."""
    if hasattr(module.weight, "dequantize") and not hasattr(module.weight, "quant_state"):
        return module.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def loss(model: LanguageModel, prompt: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, V, (2, 6), generator=g), torch.ones(2, 6, dtype=torch.int64)
    if model.encoder_decoder:
        return model.encoder_decoder_loss(prompt, ids, mask, ids, mask)
    return model.decoder_loss(prompt, ids, mask, mask.bool())


def prompts() -> Tensor:
    return torch.randn(2, 3, H, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["llama", "opt", "t5"], indirect=True)
def test_loss_and_gradient_are_those_of_the_rounded_weights(folder: Path, kind: str) -> None:
    """Against the float model with every quantized weight replaced by what it stands for."""
    model, plain, exact = load(folder, kind), load(folder), load(folder)
    with torch.no_grad():
        for name, module in quantized(model.model).items():
            plain.model.get_submodule(name).weight.copy_(floats(module))
    results = []
    for each in (model, plain, exact):
        prompt = prompts()
        value = loss(each, prompt)
        value.backward()
        results.append((value.detach(), prompt.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(results[0][0], results[2][0])
    assert_frozen(model)
    if not model.encoder_decoder:  # random T5s, whose attention is not scaled, are too rough for this
        cosine = torch.nn.functional.cosine_similarity(results[0][1].flatten(), results[2][1].flatten(), dim=0)
        assert cosine > (0.99 if kind == "int8" else 0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_no_float_copy_of_a_weight(folder: Path, kind: str) -> None:
    model, saved = load(folder, kind), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss(model, prompts())
    shapes = {tuple(floats(module).shape) for module in quantized(model.model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    large = [t for t in saved if tuple(t.shape) in shapes and not hasattr(t, "__tensor_flatten__")]
    assert len(saved) > 20
    assert large == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["llama", "opt"], indirect=True)
def test_linear_layers_are_quantized_and_the_rest_is_not(folder: Path, kind: str) -> None:
    model, plain = load(folder, kind), load(folder)
    expected = quantize.quantized_layers(plain.model)
    names = {name for name, module in plain.model.named_modules() if any(module is layer for layer in expected)}
    assert set(quantized(model.model)) == names
    assert len(names) == (14 if "llama" in str(folder) else 12)
    for part in (model.model.get_input_embeddings(), model.model.get_output_embeddings()):
        assert part.weight.dtype == torch.float32
    assert [r.frozen for r in parameter_table(model)] == [r.frozen for r in parameter_table(plain)]
    predicted = quantize.quantized_bytes(expected, kind)
    assert predicted == pytest.approx(sum(size(m.weight) for m in quantized(model.model).values()), rel=0.02)


def size(weight: Tensor) -> int:
    """Bytes behind a quantized weight."""
    if hasattr(weight, "__tensor_flatten__"):
        return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
    return weight.nbytes + weight.quant_state.absmax.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_sees_a_change_and_moving_is_none(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    before = weights_digest(model)
    assert weights_digest(load(folder, kind).to(CPU)) == before
    weight = model.model.model.layers[1].mlp.up_proj.weight
    packed = weight.qdata if hasattr(weight, "qdata") else weight.data
    packed.view(-1)[5] ^= 1
    assert weights_digest(model) != before


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_on_quantized_weights_and_do_not_merge_into_them(folder: Path, kind: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from blip2.models.language.lora import add_lora, merge_lora

    model = load(folder, kind)
    start = loss(model, prompts()).detach()
    add_lora(model, LoraConfig(rank=2))
    model.train()
    digest = weights_digest(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        loss(model, prompts()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss(model, prompts()) < start - 0.05
    assert weights_digest(model) == digest
    assert_frozen(model)
    with pytest.raises(ConfigError, match="cannot be merged into quantized weights: load the run with quantize='none'"):
        merge_lora(model)


@pytest.mark.parametrize("kind", KINDS)
def test_it_generates_what_the_rounded_weights_do(folder: Path, kind: str) -> None:
    model, plain = load(folder, kind), load(folder)
    with torch.no_grad():
        for name, module in quantized(model.model).items():
            plain.model.get_submodule(name).weight.copy_(floats(module))
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)
    data = (prompts()[:1], ids, mask, DecodingConfig(beams=3, min_tokens=6, max_tokens=6))
    assert torch.equal(model.generate(*data, end_id=2, pad_id=0), plain.generate(*data, end_id=2, pad_id=0))


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
@pytest.mark.parametrize("kind", [library("int8")])
def test_a_model_without_linear_layers_is_refused(folder: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match="gpt2 has no linear layer that could be quantized"):
        load(folder, kind)


def test_bytes_worked_by_hand() -> None:
    layers = [nn.Linear(64, 3), nn.Linear(128, 2)]
    assert quantize.quantized_bytes(layers, "int8") == (192 + 256) + 4 * 5
    assert quantize.quantized_bytes(layers, "nf4") == (192 + 256) / 2 + 7 * 4


def test_a_device_that_no_library_serves_is_named_with_what_works() -> None:
    with pytest.raises(ConfigError, match=r"'nf4': not possible on mps; what works: int8 on cuda, .* nf4 on cpu"):
        quantize.loading_options("nf4", torch.device("mps"), torch.float32)


@pytest.mark.parametrize(
    ("kind", "device", "line"),
    [
        ("int8", "cpu", r"'int8': on cpu this needs torchao: pip install 'blip2\[quantize\]'"),
        ("nf4", "cpu", r"'nf4': on cpu this needs bitsandbytes: pip install 'blip2\[gpu\]'"),
        ("int8", "cuda", r"'int8': on cuda this needs bitsandbytes: pip install 'blip2\[gpu\]'"),
    ],
)
def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: str, device: str, line: str) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=line) as caught:
        quantize.loading_options(kind, torch.device(device), torch.float32)
    assert "\n" not in str(caught.value)


def test_runs_that_cannot_be_quantized_are_refused() -> None:
    language = LanguageConfig(quantize="int8")
    with pytest.raises(ConfigError, match="language.quantize is 'int8': it must be null in stage 1"):
        RunConfig(stage="stage1", language=language)
    with pytest.raises(ConfigError, match="language.quantize is 'int8': it must be null with train.parallel fsdp2"):
        RunConfig(stage="stage2", language=language, train=TrainConfig(parallel="fsdp2"))
    assert RunConfig(stage="stage2", language=language).language.quantize == "int8"
