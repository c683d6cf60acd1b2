"""A checkpoint is compared with its model before anything is built, read or written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip2.configs import LoraConfig, QFormerConfig, RunConfig
from blip2.errors import CheckpointError
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.lazy_tensors import LazyTensor
from blip2.weights.loading import Allowed, trained_state
from blip2.weights.validate import require_complete

# Named nowhere: its sizes follow from the tensors.
QFORMER = QFormerConfig(init="some/where", queries=3, embed_dim=4)
# Tensors that sizes are taken from.
SIZES = ("ln_vision.weight", "qformer.query_tokens", "qformer.layers.0.query_ff.up.weight")


def read() -> Tensor:
    raise AssertionError("a comparison reads no values")


def checkpoint(stage: str = "stage1") -> Checkpoint:
    qformer = QFormer(width=8, depth=2, heads=2, inner=12, image_width=6, queries=3, vocab=21, positions=10)
    shapes = {name: tuple(value.shape) for name, value in trained_state(Stage1(qformer, embed_dim=4)).items()}
    if stage == "stage2":
        shapes = {n: s for n, s in shapes.items() if n.startswith(("qformer.", "ln_vision.")) and "text_ff" not in n}
        shapes = {n: s for n, s in shapes.items() if not n.startswith(("qformer.embeddings.", "qformer.head."))}
        shapes |= {"language_proj.weight": (20, 8), "language_proj.bias": (20,)}
    tensors = {name: LazyTensor(shape, torch.float32, read) for name, shape in shapes.items()}
    return Checkpoint("x", "blip2", RunConfig(stage=stage, qformer=QFORMER), tensors)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_whole_one_passes(stage: str) -> None:
    require_complete(checkpoint(stage))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_missing_tensor_is_named(stage: str) -> None:
    opened = checkpoint(stage)
    for name in [*SIZES, *list(opened.tensors)[::9]]:
        short = replace(opened, tensors={n: lazy for n, lazy in opened.tensors.items() if n != name})
        with pytest.raises(
            CheckpointError, match=f"^x: {name} is missing: the checkpoint is of another model or stage$"
        ):
            require_complete(short)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_tensor_of_another_shape_is_named(stage: str) -> None:
    opened = checkpoint(stage)
    for name in [*SIZES, *list(opened.tensors)[::9]]:
        odd = LazyTensor((*opened.tensors[name].shape, 7), torch.float32, read)
        with pytest.raises(CheckpointError, match=r"^x: \S+ (is \(|has \d axes)"):
            require_complete(replace(opened, tensors=opened.tensors | {name: odd}))


def test_one_tensor_too_many_is_named() -> None:
    opened = checkpoint()
    extra = {"language_proj.weight": LazyTensor((20, 8), torch.float32, read)}
    with pytest.raises(CheckpointError, match="^x: language_proj.weight has no place in this model"):
        require_complete(replace(opened, tensors=opened.tensors | extra))


A, B = (f"language_model.model.layers.0.fc1.lora_{kind}.default.weight" for kind in "AB")


def adapted(shapes: dict[str, tuple[int, ...]], rank: int = 2) -> Checkpoint:
    opened = checkpoint("stage2")
    extra = {name: LazyTensor(shape, torch.float32, read) for name, shape in shapes.items()}
    config = replace(opened.config, lora=LoraConfig(rank=rank))
    return replace(opened, config=config, tensors=opened.tensors | extra)


def test_adapters_pass_in_pairs_of_the_rank_of_their_run() -> None:
    require_complete(adapted({A: (2, 5), B: (7, 2)}))
    for shapes, message in (
        ({A: (2, 5)}, f"{B} is missing"),
        ({B: (7, 2)}, f"{A} is missing"),
        ({A: (2, 5), B: (7,)}, f"{B} has 1 axes, not 2"),
        ({A: (3, 5), B: (7, 3)}, r"is \(3, 5\) and \(7, 3\), and lora.rank of its run is 2"),
        ({A: (2, 5), B: (7, 3)}, "and lora.rank of its run is 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            require_complete(adapted(shapes))


def test_what_the_format_does_not_hold_may_be_missing() -> None:
    opened = checkpoint()
    opened = replace(opened, tensors={n: lazy for n, lazy in opened.tensors.items() if n != "temp"})
    require_complete(replace(opened, allowed=Allowed(fresh=("temp",))))


def test_the_configuration_decides_where_it_is_at_hand() -> None:
    """`minilm-l6` has six layers, the tensors two."""
    opened = checkpoint()
    opened = replace(opened, config=replace(opened.config, qformer=replace(QFORMER, init="minilm-l6")))
    with pytest.raises(CheckpointError, match="^x: qformer.layers.2.self_attention.query.weight is missing"):
        require_complete(opened)
