"""VQA accuracy and its normaliser, by hand and by the official rules' known cases."""

from __future__ import annotations

import pytest

from blip2.metrics.vqa import (
    answer_type,
    exact_match,
    majority_answer,
    normalise_punctuation,
    normalise_words,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_accuracy_of_ten_people(agreeing: int, accuracy: float) -> None:
    # Of 10 choices of 9 people, `agreeing` leave one who agrees out: 3 agree -> (7 * 3/3 + 3 * 2/3) / 10.
    answers = ["dog"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_accuracy(["dog"], [answers])[0] == pytest.approx(accuracy)


def test_every_question_by_itself() -> None:
    assert vqa_accuracy(["yes", "2"], [["yes"] * 10, ["3"] * 10]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a dog", "dog"),
        ("The red car", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("Im", "i'm"),
        ("its", "its"),
        ("were", "were"),
        ("an apple and the pear", "apple and pear"),
    ],
)
def test_words(text: str, plain: str) -> None:
    assert normalise_words(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("yes.", "yes"),
        ("t-shirt", "t shirt"),  # no space beside the mark: it becomes one
        ("red, white", "red white"),  # a space beside it: it goes
        ("1,000", "1000"),  # a number: all marks go
        ("1.5", "1.5"),
        ("st. john", "st john"),
        ("what?", "what "),
        ("it's", "it's"),
        ("black & white", "black & white"),
    ],
)
def test_punctuation(text: str, plain: str) -> None:
    assert normalise_punctuation(text) == plain


def test_quirk_nothing_is_normalised_where_all_agree() -> None:
    assert vqa_accuracy(["a dog"], [["dog"] * 10]) == [0.0]
    assert vqa_accuracy(["a dog"], [["dog"] * 9 + ["cat"]]) == [1.0]


def test_quirk_peoples_articles_stay() -> None:
    assert vqa_accuracy(["the dog"], [["the dog"] * 9 + ["cat"]]) == [0.0]


def test_exact_match_normalises_both() -> None:
    assert exact_match(["A circle.", "two", "red"], [["circle"], ["2"], ["blue", "green"]]) == [1.0, 1.0, 0.0]


def test_types_and_majority() -> None:
    assert [answer_type([a]) for a in ("yes", "No", "3", "two", "2.5", "red")] == [
        *("yes/no", "yes/no", "number", "number", "number", "other")
    ]
    assert answer_type(["red", "red", "yes"]) == "other"
    assert majority_answer([["yes"], ["no"], ["yes"]]) == "yes"


def test_lengths_and_missing_answers() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 questions"):
        vqa_accuracy(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="question 1 has no answer"):
        exact_match(["a", "b"], [["a"], []])
