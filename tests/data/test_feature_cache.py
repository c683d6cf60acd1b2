"""The feature cache: right values, stopped and resumed, bad images, broken folders."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip2.data.collection import Collection
from blip2.data.feature_cache import FeatureCache
from blip2.data.images import ImageSpec, decode_augmented, decode_image, plain_view
from blip2.data.sources import open_collection
from blip2.errors import DataError

SPEC = ImageSpec(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Encoder:
    """Averages rows; counts images, and stops as if killed after a number of batches."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.images, self.batches, self.stop_after = 0, 0, stop_after

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.batches == self.stop_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.images += len(pixels)
        return pixels.mean(3).transpose(1, 2)  # [B, 16, 3]


@pytest.fixture
def collection(shards: Path) -> Collection:
    return open_collection(str(shards))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def build(folder: Path, collection: Collection, encode: Encoder, **options: Any) -> FeatureCache:
    settings = {"spec": SPEC, "encoder_id": "rows", "views": 2, "crop_min": 0.5, "seed": 1, "batch": 4}
    return FeatureCache.open_or_build(folder, collection, **{**settings, **options}, encode=encode, progress=False)


def test_values_of_plain_and_augmented_views(tmp_path: Path, collection: Collection) -> None:
    cache = build(tmp_path, collection, Encoder())
    assert (cache.shape, cache.views, cache.bad, cache.usable) == ((2, 13, 16, 3), 2, [], list(range(13)))
    data = collection.samples[5].read()
    views = [
        plain_view(decode_image(data), SPEC),
        decode_augmented(data, SPEC, np.random.default_rng([1, 1, 5]), 0.5),
    ]
    got = cache.get([5, 5, 2], [0, 1, 0])
    assert got.dtype == torch.bfloat16
    for row, view in zip(got, views, strict=False):
        assert torch.equal(row, view.mean(2).T.to(torch.bfloat16))


def test_opened_again_without_encoding(tmp_path: Path, collection: Collection) -> None:
    first = build(tmp_path, collection, Encoder())
    encoder = Encoder()
    again = build(tmp_path, collection, encoder)
    assert encoder.images == 0
    everything = list(range(13))
    assert torch.equal(first.get(everything, [1] * 13), again.get(everything, [1] * 13))
    copied = pickle.loads(pickle.dumps(again))
    assert torch.equal(copied.get([3], [1]), again.get([3], [1]))
    assert len(pickle.dumps(again)) < 3000


def test_every_setting_has_a_cache_of_its_own(cache: Path, collection: Collection) -> None:
    build(cache, collection, Encoder())
    changes: list[dict[str, Any]] = [
        {"encoder_id": "other"},
        {"spec": ImageSpec(8, SPEC.mean, SPEC.std)},
        {"views": 1},
        {"crop_min": 0.9},
        {"seed": 2},
    ]
    for change in changes:
        encoder = Encoder()
        build(cache, collection, encoder, **change)
        assert encoder.images > 0, change
    assert len(list(cache.iterdir())) == 6
    # Without augmented views neither the seed nor the crop matters.
    encoder = Encoder()
    build(cache, collection, encoder, views=1, seed=9, crop_min=0.7)
    assert encoder.images == 0


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_stopped_and_resumed(stop_after: int, tmp_path: Path, collection: Collection) -> None:
    complete = build(tmp_path / "whole", collection, Encoder())
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", collection, Encoder(stop_after))
    encoder = Encoder()
    resumed = build(tmp_path / "cut", collection, encoder)
    assert encoder.images == 26 - 4 * stop_after  # nothing is encoded twice
    for view in range(2):
        assert torch.equal(resumed.get(range(13), [view] * 13), complete.get(range(13), [view] * 13))


@pytest.mark.parametrize("damage", ["features", "progress"])
def test_resume_after_damage_begins_again(damage: str, tmp_path: Path, collection: Collection) -> None:
    complete = build(tmp_path / "whole", collection, Encoder())
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", collection, Encoder(3))
    (folder,) = (tmp_path / "cut").iterdir()
    if damage == "features":
        (folder / "features.bin").unlink()
    else:
        (folder / "progress.json").write_text("")
    resumed = build(tmp_path / "cut", collection, Encoder())
    assert torch.equal(resumed.get(range(13), [0] * 13), complete.get(range(13), [0] * 13))


def test_finished_cache_that_lost_its_file_is_built_again(cache: Path, collection: Collection) -> None:
    first = build(cache, collection, Encoder()).get([0], [0])
    (folder,) = cache.iterdir()
    os.truncate(folder / "features.bin", 10)
    assert torch.equal(build(cache, collection, Encoder()).get([0], [0]), first)


def test_bad_images_are_recorded_and_left_out(
    tmp_path: Path, jpeg: Callable[..., bytes], write_shard: Callable[..., Path]
) -> None:
    images = [b"no image", b"also none", jpeg(2), jpeg(3, 90, 90)[:-3000], jpeg(4)]
    samples = [{"__key__": f"k{n}", "jpg": data, "txt": "a"} for n, data in enumerate(images)]
    collection = open_collection(str(write_shard(tmp_path / "set.tar", samples)))
    # The first batch is all bad: the shape is known only from the second.
    cache = build(tmp_path / "cache", collection, Encoder(), batch=2)
    assert cache.usable == [2, 4]
    assert [(bad.key, bad.reason) for bad in cache.bad] == [
        ("k0", "not an image"),
        ("k1", "not an image"),
        ("k3", "image is truncated"),
    ]
    reopened = build(tmp_path / "cache", collection, Encoder(0), batch=2)
    assert reopened.usable == [2, 4]
    assert reopened.bad == cache.bad
    none = Collection("none", collection.samples[:2])
    for _ in range(2):
        with pytest.raises(DataError, match="none: not one image can be decoded"):
            build(tmp_path / "cache", none, Encoder())


def test_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device; free the space") as error:
        build(tmp_path, collection, Encoder())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("features.bin"))
    monkeypatch.undo()
    assert build(tmp_path, collection, Encoder()).shape[1] == 13


def test_folder_that_cannot_be_made(tmp_path: Path, collection: Collection) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="feature cache cannot be written: Not a directory"):
        build(tmp_path / "file", collection, Encoder())


def test_vanished_shard_stops_with_its_name(tmp_path: Path, collection: Collection, shards: Path) -> None:
    (shards / "part-00001.tar").unlink()
    with pytest.raises(DataError, match="part-00001.tar: shard cannot be read"):
        build(tmp_path / "cache", collection, Encoder())


def test_two_builders_encode_once(cache: Path, collection: Collection) -> None:
    encoder = Encoder()
    threads = [threading.Thread(target=build, args=(cache, collection, encoder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoder.images == 26
    (folder,) = cache.iterdir()
    assert json.loads((folder / "meta.json").read_text())["shape"] == [2, 13, 16, 3]
    assert not (folder / "progress.json").exists()
