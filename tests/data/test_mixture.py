"""Weighted mixtures: names, shares of an epoch, exact resume, any number of processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip2.data.collection import Collection
from blip2.data.images import ImageSpec
from blip2.data.loader import TrainingBatches
from blip2.data.mixture import Part, epoch_order, epoch_size, parse_mixture
from blip2.data.sources import open_collection
from blip2.errors import ConfigError, DataError

SPEC = ImageSpec(8, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.tar*2+b.tar", [("a.tar", 2), ("b.tar", 1)]),
        ("x/*.tar*0.5 + flickr8k:train * 3", [("x/*.tar", 0.5), ("flickr8k:train", 3)]),
        ("x/*.tar", [("x/*.tar", 1)]),
        ("c++/a.tar", [("c++/a.tar", 1)]),
    ],
)
def test_names(spec: str, expected: list[tuple[str, float]]) -> None:
    assert parse_mixture(spec) == [Part(name, weight) for name, weight in expected]


def test_names_that_exist_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert parse_mixture(str(tmp_path / "a+b")) == [Part(str(tmp_path / "a+b"), 1.0)]
    with pytest.raises(ConfigError, match="a.tar.0 has weight 0"):
        parse_mixture("a.tar*0+b.tar")


def test_epochs_hold_the_shares_and_nobody_is_left_out() -> None:
    part, weights = np.repeat([0, 1, 2], [4, 6, 5]), (2.0, 0.5, 1.0)
    assert epoch_size(part, weights) == 8 + 3 + 5
    first, second = (epoch_order(part, weights, 7, epoch) for epoch in (0, 1))
    for places, turns in (first, second):
        assert Counter(part[places].tolist()) == {0: 8, 1: 3, 2: 5}
        assert all(count == 2 for count in Counter(places[part[places] == 0].tolist()).values())
        assert len(set(zip(places.tolist(), turns.tolist(), strict=True))) == 16
    halves = [set(places[part[places] == 1].tolist()) for places, _ in (first, second)]
    assert halves[0] | halves[1] == set(range(4, 10))
    again = epoch_order(part, weights, 7, 1)
    assert [x.tolist() for x in again] == [x.tolist() for x in second]
    assert first[0].tolist() != second[0].tolist()


@pytest.fixture
def mixed(tmp_path: Path, jpeg: Callable[..., bytes], write_shard: Callable[..., Path]) -> str:
    for name, count in (("a", 4), ("b", 6)):
        rows = [
            {
                "__key__": f"{name}{n}",
                "jpg": jpeg(n),
                "json": {"image_id": str(n), "captions": [f"{name} {n} {k}" for k in range(9)]},
            }
            for n in range(count)
        ]
        write_shard(tmp_path / f"{name}.tar", rows)
    return f"{tmp_path}/a.tar*2+{tmp_path}/b.tar"


def batches(spec: str | Collection, **options: Any) -> TrainingBatches:
    collection = open_collection(spec) if isinstance(spec, str) else spec
    return TrainingBatches(collection, batch=4, seed=3, spec=SPEC, **options)


def drawn(source: TrainingBatches, start: int, count: int) -> list[tuple[list[str], list[str]]]:
    steps = source.steps_from(start)
    return [(batch.keys, batch.captions) for batch, _ in zip(steps, range(count), strict=False)]


def test_resume_and_processes_see_the_same(mixed: str) -> None:
    steps = drawn(batches(mixed), 0, 9)
    assert drawn(batches(mixed), 5, 4) == steps[5:]
    ranks = [drawn(batches(mixed, rank=rank, world=2), 0, 9) for rank in range(2)]
    assert [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*ranks, strict=True)] == steps
    seen = [key for keys, _ in steps[:3] for key in keys]  # 14 places, of which 12 fill batches
    assert Counter(key[0] for key in seen)["a"] >= 6
    captions = [c for _, texts in steps[:3] for c in texts if c.startswith("a")]
    assert len(set(captions)) > 4  # the second time another caption is drawn


def test_thousands_of_shards(tmp_path: Path, jpeg: Callable[..., bytes], write_shard: Callable[..., Path]) -> None:
    """3,000 shards of two sets by brace and by glob: the same samples after a resume, and from two processes."""
    image = jpeg()
    for name, count in (("a", 2000), ("b", 1000)):
        (tmp_path / name).mkdir()
        for shard in range(count):
            rows = [{"__key__": f"{name}{shard}-{k}", "jpg": image, "json": {"captions": ["x"]}} for k in range(3)]
            write_shard(tmp_path / name / f"{shard:05d}.tar", rows)
    collection = open_collection(f"{tmp_path}/a/{{00000..01999}}.tar*2+{tmp_path}/b/*.tar*0.5")
    assert len(collection.samples) == 9000
    steps = drawn(batches(collection), 0, 60)
    assert drawn(batches(collection), 37, 23) == steps[37:]
    ranks = [drawn(batches(collection, rank=rank, world=2), 0, 60) for rank in range(2)]
    assert [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*ranks, strict=True)] == steps
    read = {key.split("-")[0] for keys, _ in steps for key in keys}
    assert len(read) > 200  # 240 places of an epoch shuffled over all 3,000 shards


def test_equal_ids_of_two_sets_are_two_images(mixed: str) -> None:
    collection = open_collection(mixed)
    assert len({sample.image_id for sample in collection.samples}) == 10
    limited = collection.limited(3)
    assert [sample.key for sample in limited.samples] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert limited.mixture == ((3, 2.0), (3, 1.0))


def test_a_part_that_is_not_there(mixed: str) -> None:
    with pytest.raises(DataError, match="gone.tar: no such shard"):
        open_collection(f"{mixed}+gone.tar")
