"""The peak of a step counted on the meta device against that of a real step of the real objective."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from blip2.configs import (
    DataConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    QFormerConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from blip2.data.batch import Batch
from blip2.data.tokenizers import InstructionReader
from blip2.estimate import step_memory
from blip2.estimate.kernels import Machine
from blip2.estimate.optimizer_memory import state_bytes, step_bytes
from blip2.estimate.step_memory import LONGER_BY, PROMPT_TOKENS, LiveBytes, step_curve, step_timeline
from blip2.models.build import build_qformer
from blip2.models.language.model import language_model_from_config
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder, vision_encoder_from_config
from blip2.training.objectives import build_objective
from blip2.training.objectives.stage2 import PIECES
from blip2.training.optim import build_optimizer
from blip2.training.performance import apply_settings

TOKENS, LONGEST, B = 12, 14, 16
FP32 = Machine(accelerator=False, autocast=False, frozen=torch.float32)
BF16 = Machine(accelerator=False, autocast=True, frozen=torch.float32)
GPU = Machine(accelerator=True, autocast=True, frozen=torch.bfloat16)

VISION = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "mlp_ratio": 2}
BERT = {"vocab_size": 200, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {"vocab_size": 150, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 150, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
LANGUAGE: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=48, dropout=0.1),
    "t5": transformers.T5Config(**T5, decoder_start_token_id=0),
}


class FixedLengthTexts:
    """Tokenizer of random texts of `TOKENS` tokens, the first of `LONGEST`; in stage 2 they begin alike."""

    pad_id, dec_id, front = 0, 199, 0

    def __init__(self, reads: str | None) -> None:
        self.text_tokenizer = self.language_tokenizer = self
        texts: Any = self
        self.instruction_reader = None if reads is None else InstructionReader(texts, reads)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        lengths = torch.full((len(texts),), TOKENS)
        lengths[:1] = LONGEST
        return torch.randint(5, 150, (len(texts), LONGEST)), torch.arange(LONGEST)[None] < lengths[:, None]

    def targets(self, prompts: list[str], captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = self(captions)
        ids[:, :PROMPT_TOKENS] = 7
        labels = mask.clone()
        labels[:, :PROMPT_TOKENS] = False
        return ids, mask, labels

    def pairs(self, prefixes: list[str], suffixes: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*self.targets(prefixes, prefixes)[:2], *self.targets(suffixes, suffixes)[:2])


def small_run(stage: str, **changes: Any) -> RunConfig:
    config = RunConfig(
        stage=stage,
        qformer=QFormerConfig(queries=4, embed_dim=16),
        data=DataConfig(cache_features=True),
        train=TrainConfig(batch=B),
    )
    return replace(config, **changes)


def small_model(config: RunConfig, language: str = "llama") -> Stage1 | Stage2:
    """A model of the default device, in train mode."""
    vision = vision_encoder_from_config(transformers.Dinov2Config(hidden_size=24, **VISION), pool=2, size=56)
    bert = transformers.BertConfig(hidden_size=32, **BERT)
    qformer = build_qformer(
        config.qformer, vision.width, bert, text=config.stage == "stage1" or config.qformer.instruction is not None
    )
    if config.stage == "stage1":
        return Stage1(qformer, vision, embed_dim=config.qformer.embed_dim).train()
    made = language_model_from_config(LANGUAGE[language])
    if config.lora.rank:
        from blip2.models.language.lora import add_lora

        add_lora(made, config.lora)
    return Stage2(qformer, made, vision).train()


def on_meta(config: RunConfig, language: str = "llama") -> Stage1 | Stage2:
    with torch.device("meta"):
        return small_model(config, language)


def real_peak(config: RunConfig, language: str, bf16: bool) -> int:
    """Most bytes beside the weights in a step of the real objective on the CPU."""
    torch.manual_seed(0)
    model, texts = small_model(config, language), FixedLengthTexts(config.qformer.instruction)
    assert isinstance(model.vision, VisionEncoder)
    apply_settings(model, config.train)
    objective = build_objective(config, model, texts)  # type: ignore[arg-type]
    captions = ["five words make a caption"] * (B * config.data.texts_per_image)
    live = LiveBytes(objective)
    with live:
        if config.train.accumulate > 1:
            for p in model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
        shape = B, model.vision.tokens, model.vision.width
        features = torch.randn(shape, dtype=torch.bfloat16 if config.data.cache_features else torch.float32)
        questions = captions if config.qformer.instruction else None
        batch = Batch([str(n) for n in range(B)], torch.arange(B), captions, features=features, questions=questions)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            losses = objective(batch, 0)
        torch.stack(list(losses.values())).sum().backward()
    return max(live.timeline)


def counted_peak(config: RunConfig, language: str, machine: Machine) -> int:
    return max(step_timeline(on_meta(config, language), config, B, machine, text_tokens=TOKENS, longest=LONGEST))


QUESTIONS = {
    "qformer": QFormerConfig(queries=4, embed_dim=16, instruction="question"),
    "data": DataConfig(cache_features=True, texts="questions"),
}
SETTINGS = [
    ("stage1", "llama", {}),
    ("stage1", "llama", {"loss": LossConfig(itm=0)}),
    ("stage1", "llama", {"loss": LossConfig(itc=0, itm=0)}),
    ("stage1", "llama", {"train": TrainConfig(batch=B, checkpoint=True)}),
    ("stage1", "llama", {"train": TrainConfig(batch=B, head_chunk=20)}),
    ("stage1", "llama", {"train": TrainConfig(batch=B, accumulate=2)}),
    ("stage1", "llama", {"vision": VisionConfig(token_drop=0.5)}),
    ("stage2", "llama", {}),
    ("stage2", "opt", {}),
    ("stage2", "t5", {}),
    ("stage2", "llama", {"train": TrainConfig(batch=B, early_backward=False)}),
    ("stage2", "t5", {"train": TrainConfig(batch=B, early_backward=False)}),
    ("stage2", "llama", {"train": TrainConfig(batch=B, checkpoint=True)}),
    ("stage2", "llama", {"train": TrainConfig(batch=B, head_chunk=20)}),
    ("stage2", "llama", {"data": DataConfig(cache_features=True, texts_per_image=3)}),
    ("stage2", "t5", {"data": DataConfig(cache_features=True, texts_per_image=3)}),
    ("stage2", "llama", {"lora": LoraConfig(rank=4)}),
    ("stage2", "llama", QUESTIONS),
    ("stage2", "llama", {"data": DataConfig(cache_features=True, shots=1)}),
    ("stage2", "t5", {"data": DataConfig(cache_features=True, shots=1)}),
]


@pytest.mark.parametrize(("stage", "language", "changes"), SETTINGS)
def test_meta_counts_the_peak_of_a_real_step(stage: str, language: str, changes: dict[str, Any]) -> None:
    """A pass or a loss left out is 10 % or more."""
    if "lora" in changes:
        pytest.importorskip("peft", reason="peft is not installed")
    config = small_run(stage, **changes)
    assert counted_peak(config, language, FP32) == pytest.approx(real_peak(config, language, bf16=False), rel=0.05)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_meta_counts_the_peak_under_autocast(stage: str) -> None:
    config = small_run(stage)
    assert counted_peak(config, "llama", BF16) == pytest.approx(real_peak(config, "llama", bf16=True), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"train": TrainConfig(batch=B, checkpoint=True)}, 0.95), ({"vision": VisionConfig(token_drop=0.5)}, 0.999)],
)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_what_saves_memory_is_seen_to(stage: str, changes: dict[str, Any], share: float) -> None:
    plain, saving = (counted_peak(c, "llama", GPU) for c in (small_run(stage), small_run(stage, **changes)))
    assert saving < share * plain


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_two_pieces_hold_what_four_do(language: str, lora: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first two pieces of a batch are counted: the largest, and one that meets its gradients."""
    config = small_run("stage2", lora=LoraConfig(rank=lora))
    two = step_timeline(on_meta(config, language), config, 32, FP32, pieces=4)
    monkeypatch.setattr(step_memory, "islice", lambda parts, count: parts)
    four = step_timeline(on_meta(config, language), config, 32, FP32, pieces=4)
    assert len(four) > len(two)
    assert max(four) == pytest.approx(max(two), rel=0.005)  # ids and masks of the others


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("machine", [FP32, GPU], ids=["cpu", "accelerator"])
def test_three_counts_give_every_batch(stage: str, machine: Machine) -> None:
    config = small_run(stage)
    model = on_meta(config)
    curve = step_curve(model, config, machine)
    for batch in (11, 100):
        assert curve(batch) == max(step_timeline(model, config, batch, machine))


def test_chunks_of_the_head_are_a_line() -> None:
    config = small_run("stage1", train=TrainConfig(batch=B, head_chunk=20))
    model = on_meta(config)
    curve = step_curve(model, config, FP32)
    assert curve(48) == pytest.approx(max(step_timeline(model, config, 48, FP32)), rel=0.02)


def test_live_bytes_by_hand() -> None:
    layer = nn.Linear(3, 5)
    live = LiveBytes(layer)
    with live:
        x = torch.ones(2, 3)  # 24 bytes
        y = layer(x)  # 40
        del y
        z = x + 1  # 24, y gone
        view = z.view(-1)  # nothing
    assert live.timeline[0] == 24
    assert max(live.timeline) == 24 + 40
    assert live.timeline[-1] == 24 + 24
    del z
    assert live._now == 48
    del view
    assert live._now == 24


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_optimizer_holds_what_is_said(name: str) -> None:
    model = Trained()
    config = OptimConfig(name=name)
    optimizer = build_optimizer(model.named_parameters(), config)
    sizes = []
    for _ in range(2):  # the first step makes the state
        model.layers(torch.randn(4, 64)).square().sum().backward()
        live = LiveBytes(model)
        live._known |= {p.grad.untyped_storage()._cdata: p.grad for p in model.parameters() if p.grad is not None}
        kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        live._known |= {t.untyped_storage()._cdata: t for t in kept}
        with live:
            optimizer.step()
        sizes.append(max(live.timeline, default=0))
        optimizer.zero_grad(set_to_none=True)
    state = [t for tensors in optimizer.state.values() for n, t in tensors.items() if n != "step" and t is not None]
    parameters = list(model.parameters())
    assert state_bytes(parameters, config) == sum(t.numel() * t.element_size() for t in state)
    assert sizes[1] == pytest.approx(step_bytes(parameters, config, accelerator=False), abs=2000)


def test_state_in_eight_bits() -> None:
    large, small = nn.Parameter(torch.empty(64, 128)), nn.Parameter(torch.empty(100))
    assert state_bytes([large, small], OptimConfig(name="adamw8bit")) == 2 * (8192 + 4 * 32) + 8 * 100


def test_longer_texts_are_known_for_every_number_of_pieces() -> None:
    assert sorted(LONGER_BY) == list(range(1, PIECES + 1))
