"""VQA accuracy as the VQA challenge counts it, with its normaliser; exact match; answer types.

The rules are those of the official evaluation (visualqa.org, "VQA Evaluation"): an answer counts
min(1, agreeing people / 3), averaged over every choice of all people but one. Its quirks are kept,
because published numbers have them: nothing is normalised where all people agree, articles and
numbers are normalised in the prediction only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"(\d)(\,)(\d)")

# Contractions that people type without their apostrophe. The tail is what follows it.
_TAILS = {
    "'s": "he how it let she somebody someone something that there what when where who why",
    "n't": "are ca could did does do had has have is might must need ought should was were wo would",
    "'d": "how it she there they we where who you he",
    "'ll": "how it somebody someone something they what who why you y'all",
    "'re": "there they what why you",
    "'ve": "could i might must not should they what where who we would you",
}
# Words that only look like a contraction without its apostrophe.
_WORDS = {"shed", "wed", "lets", "its", "were", "well", "shell", "hell", "ill", "id"}


def _contractions() -> dict[str, str]:
    table = {
        "aint": "ain't",
        "im": "i'm",
        "maam": "ma'am",
        "oclock": "o'clock",
        "shant": "shan't",
        "twas": "'twas",
        "yall": "y'all",
        "hed": "he'd",
        "howd": "how'd",
    }
    for tail, heads in _TAILS.items():
        for head in heads.split():
            plain = (head + tail).replace("'", "")
            if plain not in _WORDS:
                table[plain] = head + tail
    for first in ("could", "had", "might", "should", "would", "must"):
        joined = f"{first}n't've"
        table |= {f"{first}nt've": joined, f"{first}n'tve": joined}
    for first in ("he", "it", "she", "there", "they", "we", "who", "you", "someone", "somebody", "something"):
        joined = f"{first}'d've"
        table |= {f"{first}d've": joined, f"{first}'dve": joined}
    return table


_CONTRACTIONS = _contractions()


def normalise_punctuation(text: str) -> str:
    """Drop punctuation beside a space (all of it where a number has a comma), else make it a space."""
    out = text
    for mark in _PUNCTUATION:
        if f"{mark} " in text or f" {mark}" in text or _COMMA.search(text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return _PERIOD.sub("", out)


def normalise_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """Accuracy of each prediction in [0, 1] against the answers of several people (10 in VQAv2).

    Args:
        predictions: one answer per question.
        answers: answers of people per question, one or more.

    Raises:
        ValueError: different numbers of questions, or one without answers.
    """
    _same_length(predictions, answers)
    return [_official_accuracy(p, list(a)) for p, a in zip(predictions, answers, strict=True)]


def _official_accuracy(prediction: str, answers: list[str]) -> float:
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(answers)) > 1:
        answers = [normalise_punctuation(answer) for answer in answers]
        prediction = normalise_words(normalise_punctuation(prediction))
    if len(answers) == 1:  # one person: agree or not
        return float(prediction == answers[0])
    total = sum(answer == prediction for answer in answers)
    scores = [min(1.0, (total - (answer == prediction)) / 3) for answer in answers]
    return sum(scores) / len(scores)


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """1 where the normalised prediction equals one of the normalised answers (GQA, easy-VQA)."""
    _same_length(predictions, answers)

    def plain(text: str) -> str:
        return normalise_words(normalise_punctuation(text.strip()))

    return [float(plain(p) in {plain(a) for a in right}) for p, right in zip(predictions, answers, strict=True)]


def answer_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """`vqa_accuracy` where a question has the answers of several people, else `exact_match`."""
    return (vqa_accuracy if several_people(answers) else exact_match)(predictions, answers)


def accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Mean of `answer_scores`, in percent."""
    return 100.0 * sum(answer_scores(predictions, answers)) / len(predictions)


def several_people(answers: Sequence[Sequence[str]]) -> bool:
    """Whether a question has more than one answer."""
    return any(len(given) > 1 for given in answers)


def answer_type(answers: Sequence[str]) -> str:
    """`yes/no`, `number` or `other`, by the answer that most people gave."""
    common = Counter(answers).most_common(1)[0][0].strip().lower()
    if common in ("yes", "no"):
        return "yes/no"
    return "number" if re.fullmatch(r"\d+([.,]\d+)?", _NUMBERS.get(common, common)) else "other"


def majority_answer(answers: Sequence[Sequence[str]]) -> str:
    """The most frequent answer: its score is that of a model that never sees the image."""
    return Counter(answer for given in answers for answer in given).most_common(1)[0][0]


def _same_length(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} questions")
    empty = next((n for n, given in enumerate(answers) if not given), None)
    if empty is not None:
        raise ValueError(f"question {empty} has no answer")
