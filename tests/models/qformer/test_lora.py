"""Adapters on the Q-Former: no effect at first, then those of merged weights, in every pass and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blip2.models.freezing import is_adapter
from blip2.models.qformer.lora import LowRank, add_qformer_lora, merge_qformer_lora, stored_name
from blip2.models.qformer.model import QFormer

SIZES = {"width": 16, "depth": 3, "heads": 2, "inner": 24, "image_width": 12, "queries": 4}


def made(*, text: bool = True) -> QFormer:
    qformer = QFormer(**SIZES, vocab=30 if text else None, positions=12, dropout=0.0, attention_dropout=0.0)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in qformer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return qformer


def shake(qformer: QFormer) -> None:
    for module in qformer.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.lora_B, std=0.3)


def outputs(qformer: QFormer, norm: nn.LayerNorm) -> list[Tensor]:
    """Of every pass, from the same features, with `ln_vision` folded into the projections while gradients are on."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 5, 12, generator=generator)
    ids, mask = torch.randint(1, 30, (4, 6), generator=generator), torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = False
    kv = qformer.project_image(features, norm)
    queries, cache = qformer.encode_queries(kv)
    at = mask[:2].clone()
    at[:, -1] = False
    return [
        queries,
        qformer.encode_pair(ids, mask, kv),
        qformer.encode_text(ids, mask),
        qformer.decode_states(ids[:2], mask[:2], cache, at),
    ]


@pytest.mark.parametrize("grad", [True, False])
def test_without_effect_at_first(grad: bool) -> None:
    qformer, norm = made(), nn.LayerNorm(12)
    with torch.set_grad_enabled(grad):
        before = outputs(qformer, norm)
        add_qformer_lora(qformer, 2, 16.0)
        for old, new in zip(before, outputs(qformer, norm), strict=True):
            torch.testing.assert_close(new, old)


def test_what_trains() -> None:
    qformer, norm = made(), nn.LayerNorm(12)
    add_qformer_lora(qformer, 2, 16.0)
    shake(qformer)
    sum(out.square().sum() for out in outputs(qformer, norm)).backward()  # type: ignore[union-attr]
    trained = {name for name, p in qformer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == {name for name, p in qformer.named_parameters() if p.requires_grad}
    assert all(is_adapter(name) or name == "query_tokens" for name in trained)
    linear = sum(isinstance(module, nn.Linear) for module in qformer.layers.modules())
    assert len(trained) == 2 * linear + 1


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_as_with_merged_weights(precision: torch.dtype) -> None:
    qformer, norm = made(), nn.LayerNorm(12)
    names = list(qformer.state_dict())
    add_qformer_lora(qformer, 2, 16.0)
    shake(qformer)
    stored = [stored_name(name) for name in qformer.state_dict()]
    assert sorted(name for name in stored if not is_adapter(name)) == sorted(names)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            results = outputs(qformer, norm)
        sum(out.float().square().sum() for out in results).backward()  # type: ignore[union-attr]
        return results

    adapted = run()
    layer = qformer.layers[0].self_attention.query
    first, second = layer.parametrizations.weight[0].lora_A, layer.parametrizations.weight[0].lora_B
    merge_qformer_lora(qformer)
    assert set(qformer.state_dict()) == set(names)
    for p in qformer.parameters():
        p.requires_grad_(True)
    merged = run()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for one, other in zip(adapted, merged, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    # the chain rule through W + 8 B A
    want = 8.0 * second.T @ layer.weight.grad
    loose = 1e-5 if precision == torch.float32 else 0.1
    torch.testing.assert_close(first.grad, want.detach(), rtol=0, atol=float(want.abs().max()) * loose)
