"""Settings that trade time for memory give the losses and gradients of a run without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Gemma2Config

from blip2.configs import LanguageConfig, LossConfig, OptimConfig, RunConfig, TrainConfig
from blip2.errors import ConfigError
from blip2.models.language.model import language_model_from_config
from blip2.models.qformer.layers import Attention
from blip2.models.vision.encoder import vision_encoder_from_config
from blip2.training import checkpoint
from blip2.training.objectives.common import EarlyBackward
from blip2.training.objectives.stage1 import Stage1Objective
from blip2.training.objectives.stage2 import Stage2Objective
from blip2.training.optim import build_optimizer, set_learning_rate
from blip2.training.performance import apply_settings, require_compiler

KINDS = ("stage1", "llama", "t5")
Change = Callable[[Any], None]


def objective(tiny: Any, kind: str, dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    if kind == "stage1":
        return EarlyBackward(Stage1Objective(tiny.stage1(dropout=dropout), tiny.tokenizer, LossConfig()))
    return Stage2Objective(tiny.stage2(kind, dropout=dropout), tiny.tokenizer, LanguageConfig(prompt="a dog"))


def result(tiny: Any, kind: str, change: Change, seeds: int = 1, grow: int = 1) -> dict[str, Tensor]:
    """Losses and gradients after batches of several lengths, and sizes where they `grow`."""
    made = objective(tiny, kind).train()
    change(made.model)
    out: dict[str, Tensor] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        losses = made(tiny.batch(6 + grow * seed, seed=seed), 0)
        torch.stack(list(losses.values())).sum().backward()
        out |= {f"{name} {seed}": loss.detach() for name, loss in losses.items()}
    return out | {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def nothing(model: Any) -> None:
    pass


def steady(change: Change) -> Change:
    """Without dropout in attention, whose draws follow the padded shape: compiled texts are padded more."""

    def changed(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, Attention):
                module.attention_dropout = 0.0
        change(model)

    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_computes_again_and_changes_nothing(kind: str, tiny: Any) -> None:
    runs: list[int] = []

    def watched(on: bool) -> Change:
        def change(model: Any) -> None:
            runs.append(0)
            apply_settings(model, TrainConfig(checkpoint=on))
            names = ("FeedForward", "LlamaMLP", "T5DenseActDense")
            for module in (m for m in model.modules() if type(m).__name__ in names):
                module.register_forward_pre_hook(lambda *_: runs.__setitem__(-1, runs[-1] + 1))

        return change

    plain = result(tiny, kind, watched(False))
    assert_same(result(tiny, kind, watched(True)), plain)
    assert 2 * runs[0] >= runs[1] > 1.5 * runs[0] > 0  # what no saved tensor depends on is not computed again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_a_head_in_chunks_changes_nothing(kind: str, rows: int, tiny: Any) -> None:
    seen: list[int] = []

    def change(model: Any) -> None:
        apply_settings(model, TrainConfig(head_chunk=rows))
        head = model.qformer.head if kind == "stage1" else model.language_model.model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))

    assert_same(result(tiny, kind, change), result(tiny, kind, nothing))
    assert 0 < max(seen) <= rows
    if rows == 5:
        assert sum(seen) > 2 * 5  # more than one chunk, each twice


@pytest.mark.parametrize("rows", [None, 4])
def test_an_encoder_decoders_head_skips_padding(rows: int | None, tiny: Any) -> None:
    seen: list[int] = []
    model = objective(tiny, "t5").model.language_model
    model.chunk_head(rows)
    model.model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[:-1].numel())
    )
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    loss = model.encoder_decoder_loss(torch.randn(2, 3, 16), mask, mask, mask, mask, reduction="none")
    assert loss.shape == (8,)
    assert sum(seen) == 8


def test_a_model_with_more_than_a_head_cannot_chunk_it() -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    model = language_model_from_config(Gemma2Config(vocab_size=9, hidden_size=8, intermediate_size=8, **sizes))
    with pytest.raises(ConfigError, match="train.head_chunk is 4: not known to be right for a gemma2 model"):
        model.chunk_head(4)
    model.chunk_head(None)


def compiled(backend: str) -> Change:
    def change(model: Any) -> None:
        model.qformer.compile_layers(backend=backend)
        if hasattr(model, "language_model"):
            model.language_model.compile_blocks(backend=backend)

    return change


@pytest.mark.parametrize("kind", [pytest.param("stage1", marks=pytest.mark.slow), "llama"])
def test_layers_are_captured_whole_at_every_length(kind: str, tiny: Any) -> None:
    """Traced by dynamo and run as they are: what is captured, without a compiler's minutes."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    ours, plain = (result(tiny, kind, steady(change), seeds=3) for change in (compiled("eager"), nothing))
    assert_same(ours, plain)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_after_three_steps(kind: str, tiny: Any) -> None:
    """Ten steps, captions of other lengths in each; dynamo traces, and counts what it would compile.

    A caption split at a random word has two texts, whose padded lengths may be new later on: only then.
    """
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    made = objective(tiny, kind).train()
    compiled("eager")(made.model)
    graphs: list[int] = []
    lengths: list[set[int]] = []
    if kind == "t5":
        pad = made.model.language_model._bucketed

        def bucketed(*texts: Tensor) -> tuple[Tensor, ...]:
            padded: tuple[Tensor, ...] = pad(*texts)
            lengths[-1].add(2 * padded[0].shape[1] + (len(lengths[-1]) > 0))
            return padded

        made.model.language_model._bucketed = bucketed
    for seed in range(10):
        lengths.append(set())
        losses = made(tiny.batch(8, seed=seed), 0)
        torch.stack(list(losses.values())).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    for step in range(3, 10):
        new = lengths[step] not in lengths[:step]
        assert graphs[step] == graphs[step - 1] or (kind == "t5" and new)
    assert graphs[9] <= 2 * graphs[2]


def test_the_frozen_encoder_is_compiled_with_the_same_features(tiny: Any) -> None:
    torch._dynamo.reset()
    made = objective(tiny, "stage1").model
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    encoder = vision_encoder_from_config(Dinov2Config(hidden_size=16, **sizes), layer=-2)
    pixels = torch.randn(2, 3, 28, 28)
    plain = encoder(pixels)
    counters = torch._dynamo.utils.counters
    counters.clear()
    encoder.compile_blocks(backend="eager")
    torch.testing.assert_close(encoder(pixels), plain)
    assert counters["stats"]["unique_graphs"] > 0
    made.vision = encoder
    seen: list[bool] = []
    made.vision.compile_blocks = lambda **_: seen.append(True)
    apply_settings(made, TrainConfig(compile=True))
    encoder.unfreeze()
    apply_settings(made, TrainConfig(compile=True))
    assert seen == [True]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes of compiling on one core
@pytest.mark.parametrize("kind", KINDS)
def test_the_setting_compiles_with_the_same_losses(kind: str, tiny: Any) -> None:
    torch._dynamo.reset()
    setting = steady(lambda model: apply_settings(model, TrainConfig(compile=True)))
    assert_same(result(tiny, kind, setting, 2, 0), result(tiny, kind, steady(nothing), 2, 0), tolerance=1e-4)


def test_without_a_compiler_the_setting_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"^train.compile needs a C\+\+ compiler: no g\+\+ .* turn the setting off$"):
        apply_settings(objective(tiny, "stage1").model, TrainConfig(compile=True))
    monkeypatch.setenv("CXX", "nowhere")
    with pytest.raises(ConfigError, match="CXX is 'nowhere', which is not there"):
        require_compiler("train.compile")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bridge = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


def trained(name: str, steps: int) -> tuple[Model, torch.optim.Optimizer, list[float]]:
    model = Model()
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(name=name, lr=RATES[name], min_lr=0.0))
    return model, optimizer, train_on(model, optimizer, range(steps))


def train_on(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        set_learning_rate(optimizer, optimizer.defaults["lr"])
        loss = (model.bridge(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


RATES = {"adamw": 3e-3, "adamw8bit": 3e-3, "adafactor": 3e-2, "sgd": 3.0}


@pytest.fixture
def uncompiled() -> Any:
    """torchao compiles its step; here it runs as written."""
    torch._dynamo.reset()
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_learns_saves_and_resumes(name: str, tmp_path: Any, uncompiled: Any) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao.optim", reason="torchao is not installed")
    model, optimizer, losses = trained(name, 40)
    assert losses[-1] < 0.95 * losses[0]
    folder = checkpoint.save(tmp_path, 40, model, optimizer, {}, 1)
    again, its_optimizer, _ = trained(name, 0)
    assert checkpoint.load(folder, again, its_optimizer) == 40
    assert train_on(again, its_optimizer, range(40, 43)) == train_on(model, optimizer, range(40, 43))


def test_eight_bits_follow_adamw_at_a_third_of_the_state(tmp_path: Any, uncompiled: Any) -> None:
    pytest.importorskip("torchao.optim", reason="torchao is not installed")
    sizes, losses = [], []
    for name in ("adamw", "adamw8bit"):
        model, optimizer, curve = trained(name, 40)
        folder = checkpoint.save(tmp_path / name, 40, model, optimizer, {}, 1)
        sizes.append((folder / checkpoint.OPTIMIZER).stat().st_size)
        losses.append(torch.tensor(curve))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert sizes[1] < sizes[0] / 3


def test_without_torchao_eight_bits_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r'^optim.name adamw8bit needs torchao: pip install "blip2\[quantize\]"$'):
        build_optimizer(Model().named_parameters(), OptimConfig(name="adamw8bit"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": OptimConfig(name="adafactor")}, "optim.name is 'adafactor': it must be adamw or sgd with"),
        ({"compile": True}, "train.compile is True: it must be false with train.parallel fsdp2"),
    ],
)
def test_what_sharding_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    optim = settings.pop("optim", OptimConfig())
    with pytest.raises(ConfigError, match=message):
        RunConfig(optim=optim, train=TrainConfig(parallel="fsdp2", **settings))
