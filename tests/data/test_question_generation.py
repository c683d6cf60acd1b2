"""Questions made from captions: only what two captions agree on, and nothing denied that one mentions."""

from __future__ import annotations

import pytest

from blip2.data.question_generation import questions_from


def answers(*captions: str) -> dict[str, str]:
    return {question.text: question.answers[0] for question in questions_from(captions)}


def test_what_two_captions_agree_on() -> None:
    by_question = answers(
        "Two brown dogs are running through the snow .",
        "Two dogs running in snow .",
        "Two brown dogs play .",
        "A cat is not there .",
    )
    assert by_question["What animal is in the picture?"] == "dog"
    assert by_question["How many dogs are there?"] == "two"
    assert by_question["What color is the dog?"] == "brown"
    assert by_question["What are the dogs doing?"] == "running"
    assert by_question["Where was the picture taken?"] == "in the snow"
    assert by_question["Is there a dog in the picture?"] == "yes"
    assert "Is there a cat in the picture?" not in by_question  # one caption is not enough, and too much to deny it


@pytest.mark.parametrize(
    "captions",
    [
        (),
        ("",),
        ("A man runs .",),  # said by one
        ("A red ball .", "A blue ball ."),  # no agreement on the colour
    ],
)
def test_nothing_is_made_up(captions: tuple[str, ...]) -> None:
    assert not [q for q in questions_from(captions) if q.kind in ("color", "action", "number")]
    assert all(q.answers == ("yes",) or q.answers == ("no",) or len(captions) > 1 for q in questions_from(captions))


def test_as_many_yes_as_no_and_always_the_same() -> None:
    captions = ("A man with a ball and a bike .", "A man , a ball and a bike on grass .")
    first, again = questions_from(captions), questions_from(captions)
    assert first == again
    kinds = [q.answers[0] for q in first if q.kind == "yes/no"]
    assert kinds.count("yes") == kinds.count("no") == 2
    denied = [q.text for q in first if q.answers == ("no",)]
    assert not any(word in text for text in denied for word in (" man", "ball", "bike", "grass", "woman"))
