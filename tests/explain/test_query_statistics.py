"""What queries specialise in, against sums written out; log-odds against a table worked by hand."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.data.collection import Sample
from blip2.data.sources import open_collection
from blip2.errors import DataError
from blip2.explain.query_statistics import effective, over_represented, specialisation, words_of
from blip2.inference import Blip2


@pytest.fixture(scope="module")
def model(tiny: Path) -> Blip2:
    result = blip2.load(tiny, device="cpu", dtype="fp32")
    result.batch = 4
    return result


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Six images of noise with two captions each."""
    rng = np.random.default_rng(0)
    for n in range(6):
        Image.fromarray(rng.integers(0, 255, (48, 60, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(
            f"{('a dog on the grass', 'two cats sleep')[n % 2]}\na bird called {n * 'o'}\n"
        )
    return open_collection(str(tmp_path)).samples


def test_numbers_are_those_of_every_image_alone(model: Blip2, samples: list[Sample]) -> None:
    result = specialisation(model, samples)
    assert (result.images, result.texts, result.grid, result.layers) == (6, 12, (4, 4), [0, 2])
    alone = [model.attend(sample.read(), sample.captions[0]) for sample in samples]
    torch.testing.assert_close(result.maps, torch.stack([a.queries for a in alone]).mean(dim=0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.maps.sum(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(result.on_prefix, result.maps.mean(dim=0)[:, 0])
    cosines = torch.stack([model.attend(s.read(), caption).itc for s in samples for caption in s.captions])
    expected = torch.bincount(cosines.argmax(dim=1), minlength=5) / 12
    torch.testing.assert_close(result.wins, expected)
    own = (cosines - cosines.mean(dim=0)) / cosines.std(dim=0, correction=0)
    torch.testing.assert_close(result.stands_out, torch.bincount(own.argmax(dim=1), minlength=5) / 12)
    entropies = []
    for each in alone:
        patches = each.queries.mean(dim=0)[:, 1:]
        shares = patches / patches.sum(dim=1, keepdim=True)
        entropies.append((-(shares * shares.log()).sum(dim=1)).exp())
    torch.testing.assert_close(result.spread, torch.stack(entropies).mean(dim=0), atol=1e-4, rtol=1e-4)
    assert bool((result.places >= result.spread - 1e-3).all())  # entropy is concave


def test_examples_are_of_different_images_and_in_order(model: Blip2, samples: list[Sample]) -> None:
    result = specialisation(model, samples, examples=2)
    shown = [row for row in result.examples if row]
    assert shown
    for query, row in enumerate(result.examples):
        assert len(row) <= 2
        assert len({example.sample.key for example in row}) == len(row)
        assert [e.z for e in row] == sorted((e.z for e in row), reverse=True)
        for example in row:
            assert example.caption in example.sample.captions
            looked = model.attend(example.sample.read(), example.caption)
            assert example.cosine == pytest.approx(float(looked.itc[query]), abs=1e-5)
            torch.testing.assert_close(example.attention, looked.queries.mean(dim=0)[query], atol=1e-3, rtol=1e-3)


def test_bad_samples_are_counted(model: Blip2, samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    broken = Sample("broken", "broken", ("a dog",), str(tmp_path / "broken.png"))
    silent = Sample("silent", "silent", (), samples[0].path)
    result = specialisation(model, [broken, *samples[:2], silent])
    assert result.images == 2
    assert [bad.key for bad in result.bad] == ["broken", "silent"]
    with pytest.raises(DataError, match="broken"):
        specialisation(model, [broken])


def test_log_odds_by_hand() -> None:
    dogs, rest = Counter(dog=30, a=50), Counter(dog=10, a=60, cat=50)
    result = over_represented([dogs, rest])
    assert [word.word for word in result[0]] == ["dog"]
    assert [word.word for word in result[1]] == ["cat"]
    # prior of "dog": 100 x 40 / 200 = 20; (30 + 20) of 80 + 100, against (10 + 20) of 120 + 100
    difference = math.log(50 / 130) - math.log(30 / 190)
    assert result[0][0].z == pytest.approx(difference / math.sqrt(1 / 50 + 1 / 30))
    assert result[0][0].images == 30


def test_what_is_the_same_everywhere_does_not_stand_out() -> None:
    assert over_represented([Counter(a=40, dog=10), Counter(a=80, dog=20)]) == [[], []]
    assert over_represented([Counter(), Counter(a=5)]) == [[], []]


def test_effective_number() -> None:
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(effective(shares), torch.tensor([4.0, 1.0, 2.0]))


def test_words() -> None:
    assert words_of("Two dogs' ball, the man's: 3 Äpfel!") == ["two", "dogs", "ball", "the", "man's", "äpfel"]
