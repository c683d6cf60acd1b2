"""Caption metrics against tables worked by hand, and against pycocoevalcap where it is installed."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import pytest

from blip2.metrics.captioning import bleu, cider, cider_per_image, rouge_l, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's T-shirt isn't red.", ["a", "man", "'s", "t-shirt", "is", "n't", "red"]),
        ("Two dogs , a cat ; and ... a bird !", ["two", "dogs", "a", "cat", "and", "a", "bird"]),
        ('"Stop" (it says) -- twice', ["stop", "it", "says", "twice"]),
        ("3.5 & 1,000 at 5 o'clock", ["3.5", "&", "1,000", "at", "5", "o'clock"]),
        ("they’re café-goers", ["they", "'re", "café-goers"]),
        ("a dog cannot fly", ["a", "dog", "can", "not", "fly"]),
        ("the dogs' ball.a", ["the", "dogs", "ball.a"]),
        ("", []),
        (" . ", []),
    ],
)
def test_tokenize(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


def test_bleu_by_hand() -> None:
    # Unigrams: the (clipped to 2), cat, on, mat = 5 of 6; bigrams: the cat, on the, the mat = 3 of 5;
    # trigrams: on the mat = 1 of 4; no 4-gram. Lengths 6 and 6 (the nearer of 6 and 3): no penalty.
    result = bleu(["the cat sits on the mat"], [["the cat is on the mat", "a cat there"]])
    assert result["bleu1"] == pytest.approx(100 * 5 / 6)
    assert result["bleu2"] == pytest.approx(100 * math.sqrt(5 / 6 * 3 / 5))
    assert result["bleu3"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3))
    assert result["bleu4"] == pytest.approx(0.0, abs=0.1)


def test_bleu_clips_counts_to_one_reference() -> None:
    # "the" is at most twice in any one reference: 2 of 7 (the example of the BLEU paper).
    result = bleu(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert result["bleu1"] == pytest.approx(100 * 2 / 7)


def test_bleu_brevity_over_the_corpus() -> None:
    # 2 + 4 words against nearest references of 4 + 4: exp(1 - 8/6); every unigram right.
    result = bleu(["a b", "c d e f"], [["a b c d", "a b c d e f"], ["c d e f"]])
    assert result["bleu1"] == pytest.approx(100 * math.exp(1 - 8 / 6))


def test_bleu_takes_the_shorter_of_two_equally_near_lengths() -> None:
    # 3 words, references of 2 and 4: 2 counts, so there is no penalty.
    assert bleu(["a b c"], [["a b c d", "a b"]])["bleu1"] == pytest.approx(100.0)


def test_empty_candidate_scores_zero() -> None:
    assert bleu([""], [["a dog"]])["bleu1"] == pytest.approx(0.0, abs=1e-6)
    assert rouge_l([""], [["a dog"]]) == 0.0
    assert cider(["", "a cat"], [["a dog"], ["a cat"]]) > 0


def test_cider_by_hand() -> None:
    # Two images, log 2 for n-grams of one image, 0 for "a" (in both).
    # Image 0 "a dog" against itself: n=1 and n=2 cosines 1, n=3, 4 have none: mean 2/4 -> 500.
    # Image 1 "a bird" against "a cat": only "a" in common, which weighs nothing -> 0.
    assert cider_per_image(["a dog", "a bird"], [["a dog"], ["a cat"]]) == pytest.approx([500.0, 0.0])
    assert cider(["a dog", "a bird"], [["a dog"], ["a cat"]]) == pytest.approx(250.0)


def test_cider_length_penalty_and_clipping_by_hand() -> None:
    # "dog dog dog dog" against "dog": weights 4w and w, clipped to w: w*w / (4w * w) = 1/4 for n=1,
    # times exp(-(3 - 0)^2 / 72) for three bigrams against none; n=2..4 give 0; mean over n: / 4.
    expected = 1000 * (1 / 4) * math.exp(-9 / 72) / 4
    assert cider_per_image(["dog dog dog dog", "cat"], [["dog"], ["cat"]])[0] == pytest.approx(expected)


def test_cider_averages_over_references() -> None:
    # "x y" against "x y" (500) and "z" (0).
    assert cider_per_image(["x y", "w"], [["x y", "z"], ["w"]])[0] == pytest.approx(250.0)


def test_cider_of_one_image_is_zero() -> None:
    assert cider(["a dog"], [["a dog"]]) == 0.0


def test_rouge_by_hand() -> None:
    # LCS of "police killed the gunman" and "police kill the gunman" is 3: precision = recall = 3/4.
    assert rouge_l(["police killed the gunman"], [["police kill the gunman"]]) == pytest.approx(75.0)
    # Best precision 2/2 (second), best recall 2/3 (second; the first has 1/2), beta 1.2.
    precision, recall = 1.0, 2 / 3
    expected = 100 * (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(["a c"], [["b a", "a b c"]]) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [bleu, cider, rouge_l])
@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "0 candidates"),
        (["a"], [["a"], ["b"]], "1 candidates and 2"),
        (["a", "b"], [["a"], []], "references of image 1"),
        (["a"], ["a"], "references of image 0"),
    ],
)
def test_refuses(metric: object, candidates: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(candidates, references)  # type: ignore[operator]


def _flickr8k_captions(folder: Path, images: int) -> tuple[list[str], list[list[str]]]:
    """First caption of each image as the candidate, another image's for every third; four references."""
    with tarfile.open(folder / "dev-00000.tar") as tar:
        names = [m for m in tar.getmembers() if m.name.endswith(".json")][:images]
        texts = [json.load(tar.extractfile(m))["captions"] for m in names]  # type: ignore[arg-type]
    candidates = [texts[(i + 1) % len(texts) if i % 3 == 0 else i][0] for i in range(len(texts))]
    return candidates, [t[1:] for t in texts]


def test_agrees_with_pycocoevalcap(flickr8k: Path) -> None:
    """Measured 2e-13 (1,000 images) apart at most; 1e-6 rules out any other formula, smoothing or length rule."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = _flickr8k_captions(flickr8k, 50)
    truth = {i: [" ".join(tokenize(r)) for r in refs] for i, refs in enumerate(references)}
    ours = {i: [" ".join(tokenize(c))] for i, c in enumerate(candidates)}
    theirs_bleu, _ = Bleu(4).compute_score(truth, ours, verbose=0)
    assert list(bleu(candidates, references).values()) == pytest.approx([100 * b for b in theirs_bleu], abs=1e-6)
    theirs_cider, per_image = Cider().compute_score(truth, ours)
    assert cider(candidates, references) == pytest.approx(100 * theirs_cider, abs=1e-6)
    assert cider_per_image(candidates, references) == pytest.approx([100 * c for c in per_image], abs=1e-6)
    assert rouge_l(candidates, references) == pytest.approx(100 * Rouge().compute_score(truth, ours)[0], abs=1e-6)
