"""Freezing, its assertion, and the checksum that proves it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blip2.errors import RunError
from blip2.models.freezing import (
    ParameterRow,
    assert_frozen,
    freeze,
    is_adapter,
    parameter_table,
    weights_digest,
)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Dropout()), nn.Linear(4, 2, bias=False))


def test_freeze_stops_gradients_and_dropout() -> None:
    net = model()
    freeze(net[0])
    assert not net[0].training
    assert net[1].training
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["1.weight"]
    assert_frozen(net[0])


def test_table_counts_shared_parameters_once() -> None:
    net = model()
    freeze(net[0])
    assert parameter_table(net) == [ParameterRow("0", 0, 16), ParameterRow("1", 8, 0)]
    net.append(net[1])
    assert sum(row.trainable + row.frozen for row in parameter_table(net)) == 24


def test_assertion_names_what_is_not_frozen() -> None:
    net = model()
    with pytest.raises(RunError, match="image encoder: parameter 0.0.weight requires a gradient"):
        assert_frozen(net, "image encoder")
    net(torch.ones(2, 3)).sum().backward()
    net.requires_grad_(False)
    with pytest.raises(RunError, match="parameter 0.0.weight received a gradient"):
        assert_frozen(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_digest_sees_the_smallest_change(dtype: torch.dtype) -> None:
    net = model().to(dtype)
    before = weights_digest(net)
    assert weights_digest(model().to(dtype)) == before
    with torch.no_grad():
        weight = net.get_parameter("1.weight")
        weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0, dtype=dtype))
    assert weights_digest(net) != before


def test_digest_tells_dtype_and_place_apart() -> None:
    assert weights_digest(model()) != weights_digest(model().double())
    wide, tall = nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        tall.weight.copy_(wide.weight.T)
    assert weights_digest(wide) != weights_digest(tall)


def test_adapters_are_told_by_name() -> None:
    assert is_adapter("model.layers.0.q_proj.lora_A.default.weight")
    assert is_adapter("q_proj.lora_dropout.default")
    assert not is_adapter("q_proj.base_layer.weight")
    assert not is_adapter("flora_a.weight")
