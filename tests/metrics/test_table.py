"""The table of metrics: what is computed is each function's own, and every place that names a metric finds it."""

from __future__ import annotations

import pytest

from blip2.configs import BEST
from blip2.evaluation.published import TASKS
from blip2.metrics.captioning import bleu, cider, rouge_l
from blip2.metrics.table import CAPTION, METRICS, measure
from blip2.metrics.vqa import exact_match, vqa_accuracy

GUESSES = ["a dog runs", "two cats sleep"]
REFERENCES = [["a dog runs on grass", "a dog"], ["cats sleep"]]


def test_scores_are_the_functions_own() -> None:
    expected = {**bleu(GUESSES, REFERENCES), "rouge_l": rouge_l(GUESSES, REFERENCES)}
    expected["cider"] = cider(GUESSES, REFERENCES)
    assert measure(CAPTION, GUESSES, REFERENCES) == expected
    assert measure(["bleu4"], GUESSES, REFERENCES) == {"bleu4": expected["bleu4"]}


def test_accuracy_takes_the_rule_that_the_answers_allow() -> None:
    several, single = [["dog"] * 9 + ["cat"], ["2"]], [["dog"], ["a 2"]]
    assert measure(["accuracy"], ["dog", "2"], several)["accuracy"] == 50 * sum(vqa_accuracy(["dog", "2"], several))
    assert measure(["accuracy"], ["cat", "two"], single)["accuracy"] == 50 * sum(exact_match(["cat", "two"], single))


def test_every_name_is_in_the_table() -> None:
    assert set(BEST) - {"loss", "recall"} <= METRICS.keys()
    reported = {name for task in ("caption", "vqa") for values in TASKS[task].values() for name in values}
    assert reported <= METRICS.keys()


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(KeyError):
        measure(["chrf"], GUESSES, REFERENCES)
