"""Attention by products against PyTorch's kernel: values and gradients, in both precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.ops import attention as module
from blip2.ops.attention import attention, fast_kernels


def tensors(dtype: torch.dtype, queries: int = 5, keys: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, queries, 16), (3, 4, keys, 16), (3, 4, keys, 16))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """In float64, with the formula."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients(dtype: torch.dtype, tolerance: float, masked: bool) -> None:
    inputs = tensors(dtype)
    mask = None
    if masked:
        mask = torch.rand(3, 1, 5, 9, generator=torch.Generator().manual_seed(1)) > 0.4
        mask[..., 0] = True
    upstream = torch.randn(3, 4, 5, 16, generator=torch.Generator().manual_seed(2))
    out = attention(*inputs, mask)
    assert out.dtype == dtype
    out.backward(upstream.to(dtype))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact, mask)
    expected.backward(upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=2 * tolerance, atol=2 * tolerance)


def test_the_form_is_chosen_by_device_dtype_gradient_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        module.F, "scaled_dot_product_attention", lambda *a, **o: calls.append("fused") or kernel(*a, **o)
    )
    attention(*tensors(torch.bfloat16))
    assert not calls
    with torch.no_grad():
        attention(*tensors(torch.bfloat16))
    attention(*(x.detach() for x in tensors(torch.bfloat16)))
    attention(*tensors(torch.float32))
    attention(*tensors(torch.bfloat16, 500, 500))
    assert len(calls) == 4


def test_dropout_drops_weights() -> None:
    q, k, _ = tensors(torch.bfloat16)
    torch.manual_seed(0)
    weights = attention(q, k, torch.eye(9, dtype=torch.bfloat16).expand(3, 4, 9, 9), dropout=0.5)
    share = float((weights == 0).float().mean())
    assert 0.35 < share < 0.65


@pytest.mark.parametrize(
    ("dtype", "wide", "math"), [(torch.bfloat16, 5, True), (torch.float32, 5, False), (torch.bfloat16, 500, False)]
)
def test_models_of_their_own_kind(dtype: torch.dtype, wide: int, math: bool) -> None:
    x = torch.zeros(1, wide, 2, dtype=dtype, requires_grad=True)
    with fast_kernels(x):
        assert torch.backends.cuda.flash_sdp_enabled() is not math
    with torch.no_grad(), fast_kernels(x):
        assert torch.backends.cuda.flash_sdp_enabled()
