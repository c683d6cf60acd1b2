"""A batch falls into micro-batches in order, its texts beside their images."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from blip2.data.batch import Batch
from blip2.data.collection import BadSample
from blip2.errors import DataError

BAD = [BadSample("k9", "a.tar", "no image")]


@pytest.fixture
def batch() -> Batch:
    """Four images with two texts each: text n is about image n mod 4."""
    random = torch.Generator().manual_seed(0)
    return Batch(
        keys=["k0", "k1", "k2", "k3"],
        image_ids=torch.tensor([5, 6, 5, 7]),
        captions=[f"{turn} of {image}" for turn in ("first", "second") for image in range(4)],
        pixels=torch.rand(4, 3, 8, 8, generator=random),
        features=torch.rand(4, 5, 6, generator=random),
        skipped=BAD,
        questions=[f"{turn} about {image}?" for turn in ("first", "second") for image in range(4)],
    )


def test_split_keeps_order_and_skipped_once(batch: Batch) -> None:
    parts = batch.split(2)
    assert [part.keys for part in parts] == [["k0", "k1"], ["k2", "k3"]]
    assert [part.skipped for part in parts] == [BAD, []]
    for name in ("image_ids", "pixels", "features"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert parts[1].captions == ["first of 2", "first of 3", "second of 2", "second of 3"]
    assert parts[1].questions == ["first about 2?", "first about 3?", "second about 2?", "second about 3?"]


def test_split_into_unequal_parts_is_refused(batch: Batch) -> None:
    with pytest.raises(DataError, match="a batch of 4 cannot be split into 3 equal micro-batches"):
        batch.split(3)


def test_what_a_batch_has_not_its_parts_have_not() -> None:
    parts = Batch(["a", "b"], torch.tensor([0, 1]), ["one", "two"]).split(2)
    assert [(part.pixels, part.features, part.questions) for part in parts] == [(None, None, None)] * 2


def test_a_device_changes_nothing_but_the_place(batch: Batch) -> None:
    moved = batch.to(torch.device("meta"))
    assert all(getattr(moved, name).device.type == "meta" for name in ("image_ids", "pixels", "features"))
    back = batch.to(torch.device("cpu"))
    for field in fields(Batch):
        one, other = getattr(back, field.name), getattr(batch, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
