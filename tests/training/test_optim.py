"""The schedule as a table worked by hand, and which tensors decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ViTConfig

from blip2.configs import OptimConfig
from blip2.models.vision.encoder import vision_encoder_from_config
from blip2.training.optim import build_optimizer, learning_rate

CONFIG = OptimConfig(lr=1.0, min_lr=0.1, warmup_lr=0.2, warmup=4)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.2), (1, 0.4), (2, 0.6), (3, 0.8), (4, 1.0), (6, 0.1 + 0.9 * 0.853553), (8, 0.55), (12, 0.1), (40, 0.1)],
)
def test_schedule(step: int, rate: float) -> None:
    """13 steps: four of warm-up, then the cosine from 1.0 at step 4 over its middle at 8 to 0.1 at 12."""
    assert learning_rate(step, 13, CONFIG) == pytest.approx(rate, abs=1e-6)


def test_without_warmup_the_peak_comes_first() -> None:
    config = OptimConfig(lr=1e-3, min_lr=0.0, warmup_lr=0.0, warmup=0)
    assert learning_rate(0, 5, config) == 1e-3
    assert learning_rate(2, 5, config) == pytest.approx(5e-4)
    assert learning_rate(4, 5, config) == 0


def test_a_run_shorter_than_its_warmup() -> None:
    assert [learning_rate(step, 2, CONFIG) for step in (0, 1)] == pytest.approx([0.2, 0.4])
    assert learning_rate(0, 1, OptimConfig(lr=1e-3, warmup=0)) == 1e-3


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))
        self.table = nn.Parameter(torch.ones(1, 4, 3))
        self.bias = nn.Parameter(torch.ones(3))
        self.temp = nn.Parameter(torch.ones(1))
        self.scalar = nn.Parameter(torch.tensor(1.0))


def test_only_tensors_of_two_axes_and_more_decay() -> None:
    """A step with a gradient of zero is the decay alone: 1 - lr x weight_decay."""
    part = Part()
    optimizer = build_optimizer(part.named_parameters(), OptimConfig(lr=0.1, min_lr=0.0, weight_decay=0.5))
    for p in part.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in part.named_parameters():
        want = 0.95 if name in ("matrix", "table") else 1.0
        torch.testing.assert_close(p.detach(), torch.full_like(p, want), msg=lambda m, n=name: f"{n}: {m}")


def test_every_parameter_is_in_one_group() -> None:
    part = Part()
    optimizer = build_optimizer(part.named_parameters(), OptimConfig(betas=(0.8, 0.95)))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in part.parameters()}
    assert len(held) == 5
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)


def test_parameters_of_one_kind_make_one_group() -> None:
    optimizer = build_optimizer([("bias", nn.Parameter(torch.ones(3)))], OptimConfig())
    assert len(optimizer.param_groups) == 1


def test_the_qformer_may_have_a_rate_of_its_own() -> None:
    model = nn.ModuleDict({"qformer": Part(), "language_proj": nn.Linear(2, 3), "ln_vision": nn.LayerNorm(2)})
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(qformer_scale=0.1))
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert scales[id(p)] == (1.0 if name.startswith("language_proj") else 0.1), name
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all((decays[id(p)] > 0) == (p.ndim >= 2) for p in model.parameters())


def test_an_image_encoder_that_trains_is_slower_the_deeper() -> None:
    shape = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = vision_encoder_from_config(ViTConfig(**shape, image_size=8, patch_size=4))
    vision.unfreeze()
    model = nn.ModuleDict({"vision": vision, "itm_head": nn.Linear(2, 2)})
    depths = {f"vision.model.{name}": depth for name, depth in vision.depths.items()}
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(layer_decay=0.5), depths)
    scales = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    names: dict[float, set[str]] = {}
    for name, p in model.named_parameters():
        names.setdefault(scales[id(p)], set()).add(".".join(name.split(".")[2:4]))
    assert names == {
        1.0: {"", "layers.2", "layernorm.weight", "layernorm.bias"},
        0.5: {"layers.1"},
        0.25: {"layers.0"},
        0.125: {"embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings"},
    }
