"""Batches as a pure function of seed and step: resume, processes, workers, bad samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2.data.batch import Batch
from blip2.data.collection import Collection
from blip2.data.feature_cache import FeatureCache
from blip2.data.images import ImageSpec, decode_image, plain_view
from blip2.data.loader import TrainingBatches, dev_batches
from blip2.data.sources import open_collection
from blip2.errors import DataError

Jpeg = Callable[..., bytes]
SPEC = ImageSpec(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def collection(shards: Path) -> Collection:
    return open_collection(str(shards))


def batches(collection: Collection, batch: int = 4, **options: Any) -> TrainingBatches:
    return TrainingBatches(collection, **{"batch": batch, "seed": 3, "spec": SPEC, "augment": True, **options})


def take(stream: Iterator[Batch], count: int) -> list[Batch]:
    return list(islice(stream, count))


def same(one: Batch, other: Batch) -> bool:
    assert one.pixels is not None
    assert other.pixels is not None
    return (
        one.keys == other.keys
        and one.captions == other.captions
        and torch.equal(one.image_ids, other.image_ids)
        and torch.equal(one.pixels, other.pixels)
    )


def joined(parts: list[Batch]) -> Batch:
    pixels = torch.cat([part.pixels for part in parts if part.pixels is not None])
    keys, captions = [k for p in parts for k in p.keys], [c for p in parts for c in p.captions]
    return Batch(keys, torch.cat([part.image_ids for part in parts]), captions, pixels)


def test_resume_from_any_step(collection: Collection) -> None:
    all_steps = take(batches(collection).steps_from(0), 8)
    for step in (1, 3, 6):  # 3 steps an epoch: within the first, at the second's and third's begin
        resumed = take(batches(collection).steps_from(step), 8 - step)
        assert all(same(one, other) for one, other in zip(all_steps[step:], resumed, strict=True))


def test_an_epoch_sees_each_sample_once_in_another_order(collection: Collection) -> None:
    steps = take(batches(collection, batch=6).steps_from(0), 4)
    epochs = [[key for step in steps[n : n + 2] for key in step.keys] for n in (0, 2)]
    assert all(len(set(keys)) == 12 for keys in epochs)  # 13 samples: one is left over
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_captions_and_crops_change_between_epochs_and_seeds(collection: Collection) -> None:
    steps = take(batches(collection, batch=13).steps_from(0), 6)
    captions = {(key, caption) for step in steps for key, caption in zip(step.keys, step.captions, strict=True)}
    assert len(captions) > 20  # both of most samples' two captions
    seen = [step.pixels[step.keys.index("key004")] for step in steps if step.pixels is not None]
    assert not any(torch.equal(seen[0], view) for view in seen[1:])
    other = next(batches(collection, batch=13, seed=4).steps_from(0))
    assert other.keys != steps[0].keys


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_global_batch(world: int, collection: Collection) -> None:
    all_steps = take(batches(collection).steps_from(2), 4)
    ranks = [take(batches(collection, rank=rank, world=world).steps_from(2), 4) for rank in range(world)]
    for step, expected in enumerate(all_steps):
        assert same(joined([parts[step] for parts in ranks]), expected)


def test_workers_change_nothing(collection: Collection) -> None:
    alone = take(batches(collection).steps_from(2), 5)
    helped = take(batches(collection, workers=2).steps_from(2), 5)
    assert all(same(one, other) for one, other in zip(alone, helped, strict=True))


def test_several_texts_of_an_image(collection: Collection) -> None:
    """Text n is about image n mod B; none comes twice before all of an image's have come."""
    stream = batches(collection, texts_per_image=3).steps_from(0)
    captions = {sample.key: sample.captions for sample in collection.samples}
    for batch in take(stream, 3):
        assert len(batch.captions) == 3 * len(batch) == 12
        for image, key in enumerate(batch.keys):
            mine = batch.captions[image :: len(batch)]
            assert set(mine) <= set(captions[key])
            assert len(set(mine)) == min(3, len(set(captions[key])))
        halves = batch.split(2)
        assert [half.captions for half in halves] == [
            [c for n, c in enumerate(batch.captions) if n % 4 in rows] for rows in ((0, 1), (2, 3))
        ]


def test_image_ids_are_equal_for_the_same_image(tmp_path: Path, jpeg: Jpeg) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    lines = [{"image": name, "caption": f"{name} {n}"} for n in range(2) for name in ("a.jpg", "b.jpg")]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = next(batches(open_collection(str(tmp_path / "set.jsonl"))).steps_from(0))
    ids = dict(zip(batch.captions, batch.image_ids.tolist(), strict=True))
    assert ids["a.jpg 0"] == ids["a.jpg 1"] != ids["b.jpg 0"] == ids["b.jpg 1"]
    assert batch.image_ids.dtype == torch.int64


@pytest.fixture
def holed(tmp_path: Path, jpeg: Jpeg, write_shard: Callable[..., Path]) -> Collection:
    """Ten samples of which k2, k3 and k9 cannot be decoded."""
    samples: list[dict[str, Any]] = []
    for n in range(10):
        data = {2: b"no image", 3: jpeg(3)[:60], 9: jpeg(9)[:-200]}.get(n, jpeg(n, width=60, height=60))
        samples.append({"__key__": f"k{n}", "jpg": data, "json": {"captions": [f"picture {n}"]}})
    return open_collection(str(write_shard(tmp_path / "holed.tar", samples)))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_listed_once(workers: int, holed: Collection) -> None:
    stream = batches(holed, batch=5, augment=False, workers=workers)
    steps = take(stream.steps_from(0), 6)
    assert all(len(step) == 5 for step in steps)
    keys = [key for step in steps for key in step.keys]
    assert not {"k2", "k3", "k9"} & set(keys)
    # k2 and k3 are replaced by k4, k9 by k0: each epoch sees k4 three times, k0 twice.
    assert (keys.count("k4"), keys.count("k0"), keys.count("k1")) == (9, 6, 3)
    assert sorted(bad.key for bad in stream.bad) == ["k2", "k3", "k9"]
    assert sorted(bad.key for step in steps for bad in step.skipped) == ["k2", "k3", "k9"]
    assert all(step.captions == [f"picture {key[1:]}" for key in step.keys] for step in steps)


def test_resume_and_processes_with_bad_images(holed: Collection) -> None:
    all_steps = take(batches(holed).steps_from(0), 5)
    resumed = take(batches(holed).steps_from(3), 2)
    ranks = [take(batches(holed, rank=rank, world=2).steps_from(0), 5) for rank in range(2)]
    assert all(same(one, other) for one, other in zip(all_steps[3:], resumed, strict=True))
    assert all(same(joined([a, b]), c) for a, b, c in zip(*ranks, all_steps, strict=True))


def test_all_bad_is_an_error(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    samples = [{"__key__": f"k{n}", "jpg": b"no image", "txt": "a"} for n in range(3)]
    collection = open_collection(str(write_shard(tmp_path / "set.tar", samples)))
    with pytest.raises(DataError, match="not one image can be decoded"):
        next(batches(collection, batch=2).steps_from(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_vanished_shard_is_one_line(workers: int, collection: Collection, shards: Path) -> None:
    stream = batches(collection, workers=workers).steps_from(0)
    (shards / "part-00000.tar").unlink()
    with pytest.raises(DataError, match="part-00000.tar: shard cannot be read: No such file") as error:
        take(stream, 6)
    assert "\n" not in str(error.value)


def test_numbers_that_cannot_work(collection: Collection) -> None:
    with pytest.raises(DataError, match="13 usable samples with a caption are fewer than a batch of 14"):
        batches(collection, batch=14)
    with pytest.raises(DataError, match="train.batch 4 cannot be shared equally by 3 processes"):
        batches(collection, world=3)


def test_samples_without_caption_are_left_out(tmp_path: Path, jpeg: Jpeg, write_shard: Callable[..., Path]) -> None:
    texts = [{"captions": ["a"]}, {"question": "what?", "answers": ["this"]}, {"captions": ["b"]}]
    samples = [{"__key__": f"k{n}", "jpg": jpeg(n), "json": text} for n, text in enumerate(texts)]
    stream = batches(open_collection(str(write_shard(tmp_path / "set.tar", samples))), batch=2)
    assert [(bad.key, bad.reason) for bad in stream.bad] == [("k1", "no caption")]
    assert {key for step in take(stream.steps_from(0), 3) for key in step.keys} == {"k0", "k2"}


def test_dev_batches_are_plain_and_in_order(holed: Collection) -> None:
    dev = list(dev_batches(holed, batch=4, spec=SPEC))
    assert [key for batch in dev for key in batch.keys] == ["k0", "k1", "k4", "k5", "k6", "k7", "k8"]
    assert [len(batch) for batch in dev] == [4, 3]
    expected = plain_view(decode_image(holed.samples[4].read()), SPEC)
    assert dev[0].pixels is not None
    assert torch.equal(dev[0].pixels[2], expected)
    assert dev[0].captions[2] == "picture 4"


def test_cached_features_in_place_of_images(holed: Collection, tmp_path: Path) -> None:
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(2)[:, :, :5]

    cache = FeatureCache.open_or_build(
        tmp_path / "cache", holed, spec=SPEC, encoder_id="first", encode=encode, views=3, progress=False
    )
    options = {"spec": None, "features": cache, "batch": 7}
    steps = take(batches(holed, **options).steps_from(0), 6)
    resumed = take(batches(holed, **options).steps_from(4), 2)
    drawn = set()
    for step in steps:
        assert step.pixels is None
        assert step.features is not None
        assert step.features.shape == (7, 3, 5)
        assert not {"k2", "k3", "k9"} & set(step.keys)
        index = [sample.key for sample in holed.samples].index(step.keys[0])
        drawn |= {view for view in range(3) if torch.equal(cache.get([index], [view])[0], step.features[0])}
    assert len(drawn) > 1  # more than one view is drawn over six epochs
    for one, other in zip(steps[4:], resumed, strict=True):
        assert one.keys == other.keys
        assert one.features is not None
        assert other.features is not None
        assert torch.equal(one.features, other.features)
    assert sorted(bad.key for bad in batches(holed, **options).bad) == ["k2", "k3", "k9"]
    plain = list(dev_batches(holed, batch=7, spec=None, features=cache))
    assert plain[0].features is not None
    assert torch.equal(plain[0].features, cache.get(cache.usable, [0] * 7))


def test_flickr8k_batches(flickr8k: Path) -> None:
    collection = open_collection(str(flickr8k / "dev-*.tar")).limited(32)
    batch = next(batches(collection, batch=8, spec=ImageSpec(224, SPEC.mean, SPEC.std)).steps_from(0))
    assert batch.pixels is not None
    assert batch.pixels.shape == (8, 3, 224, 224)
    assert all(len(sample.captions) == 5 for sample in collection.samples)


@pytest.fixture
def with_questions(tmp_path: Path, jpeg: Jpeg, write_shard: Callable[..., Path]) -> Collection:
    """Eight images, all with a caption: six with two questions, one with a question nobody answered, one with none."""
    entries = []
    for n in range(8):
        questions = [
            {"question": f"what is {n}?", "answers": ["a", "a", "a", "b"]},
            {"question": f"where is {n}?", "answers": ["here"]},
        ]
        qa = questions if n < 6 else [{"question": "why?", "answers": []}][: 7 - n]
        entries.append({"__key__": f"k{n}", "jpg": jpeg(n), "json": {"captions": ["x"], "qa": qa}})
    write_shard(tmp_path / "qa.tar", entries)
    return open_collection(str(tmp_path / "qa.tar"))


def test_questions_come_with_an_answer_drawn_as_often_as_it_was_given(with_questions: Collection) -> None:
    source = batches(with_questions, 6, texts="questions")
    assert [(bad.key, bad.reason) for bad in source.bad] == [
        ("k6", "no question with an answer"),
        ("k7", "no question with an answer"),
    ]
    taken = take(source.steps_from(0), 60)
    pairs = [(q, a) for batch in taken for q, a in zip(batch.questions or [], batch.captions, strict=True)]
    assert len(pairs) == 360
    for batch in taken:
        for key, question in zip(batch.keys, batch.questions or [], strict=True):
            assert question.endswith(f"is {key[1]}?")
    what = [answer for question, answer in pairs if question.startswith("what")]
    assert {answer for question, answer in pairs if question.startswith("where")} == {"here"}
    assert 0.4 < len(what) / len(pairs) < 0.6
    assert 0.65 < what.count("a") / len(what) < 0.85
    again = take(batches(with_questions, 6, texts="questions").steps_from(7), 1)[0]
    assert (again.questions, again.captions) == (taken[7].questions, taken[7].captions)
    half = taken[0].split(2)[1]
    assert half.questions == (taken[0].questions or [])[3:]


def test_dev_asks_the_same_question_every_time(with_questions: Collection) -> None:
    first, second = (list(dev_batches(with_questions, batch=4, spec=SPEC, texts="questions")) for _ in range(2))
    assert [b.questions for b in first] == [b.questions for b in second]
    assert sum(len(b) for b in first) == 6
    assert all(b.questions is None for b in dev_batches(with_questions, batch=4, spec=SPEC))


def test_both_asks_what_the_captions_agree_on(collection: Collection, with_questions: Collection) -> None:
    agreeing = replace(
        collection,
        samples=[
            replace(s, captions=("two dogs run on grass", "two dogs are running in the grass"))
            for s in collection.samples
        ],
    )
    stream = batches(agreeing, texts="both", texts_per_image=5).steps_from(0)
    pairs = [
        (question, text)
        for batch in take(stream, 12)
        for question, text in zip(batch.questions or [], batch.captions, strict=True)
    ]
    questions = {pair for pair in pairs if pair[0]}
    assert ("How many dogs are there?", "two") in questions
    assert {text for question, text in pairs if not question} == set(agreeing.samples[0].captions)
    assert 0.1 < sum(bool(question) for question, _ in pairs) / len(pairs) < 0.3
    own = take(batches(with_questions, batch=1, texts="both", texts_per_image=50).steps_from(0), 1)[0]
    assert {q for q in own.questions or [] if q} <= {q.text for s in with_questions.samples for q in s.questions}
