"""`blip2 evaluate vqa`: accuracy of a model's answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from blip2.configs import DecodingConfig
from blip2.configs.checks import require
from blip2.data.collection import Collection, Question, Sample
from blip2.data.film import sample_source
from blip2.errors import ConfigError, DataError
from blip2.evaluation.inputs import decoding_options, few_shot_examples, few_shot_settings, read_lines
from blip2.evaluation.prediction_log import Entries, Folder, work_through
from blip2.evaluation.report import Outcome
from blip2.inference import Blip2
from blip2.inference.few_shot import Examples
from blip2.metrics.table import measure
from blip2.metrics.vqa import answer_scores, answer_type, majority_answer, several_people


class VQA:
    """Answer every question, freely or by ranking candidates, the same examples in front of every image.

    Raises:
        ConfigError: an option is refused, or simplemma is not installed where words are compared in their base forms.
        DataError: no questions, one without an answer, or no candidates in the file that `--candidates` names.
    """

    def __init__(self, options: argparse.Namespace, data: Collection) -> None:
        require(options.questions is None or options.questions >= 1, "--questions", options.questions, "1 or more")
        self.options = options
        self.decoding = DecodingConfig.for_answers(**decoding_options(options))
        questions = questions_of(data)
        self.questions = questions[: options.questions]
        self.candidates = _candidates(options.candidates, questions)
        # OK-VQA's answers are base forms
        is_okvqa = "okvqa" in data.name.lower().replace("-", "").replace("_", "")
        self.lemmas = options.lemmas == "on" or (options.lemmas == "auto" and is_okvqa)
        if self.lemmas:
            lemmatised(["a"])
        self.shots = few_shot_examples(options, data)

    def settings(self, model: Blip2) -> dict[str, Any]:
        """What of the options can move the numbers."""
        options = self.options
        return {
            **asdict(self.decoding),
            "question": model.config.language.question,
            "questions": options.questions,
            "shuffled": options.shuffle,
            "candidates": options.candidates,
            "lemmas": self.lemmas,
            **few_shot_settings(options, self.shots),
        }

    def run(self, model: Blip2, folder: Folder) -> Outcome:
        """Answer what has no answer in the folder yet, and score all.

        With `--shuffle` each question is shown another image than its own: what the language alone knows.
        """
        shots = Examples(model, self.shots) if self.shots else ()
        images = [sample for sample, _ in self.questions]
        if self.options.shuffle:
            images = images[len(images) // 2 :] + images[: len(images) // 2]

        def predict(chunk: list[int]) -> Entries:
            files = [sample_source(images[n], model.frames) for n in chunk]
            questions = [self.questions[n][1] for n in chunk]
            texts = [question.text for question in questions]
            if self.candidates:
                answers = model.rank_answers(files, texts, self.candidates)
            else:
                answers = model.ask(files, texts, decoding=self.decoding, shots=shots)
            return [
                {"image": images[n].key, "question": q.text, "answer": answer, "answers": list(q.answers)}
                for n, q, answer in zip(chunk, questions, answers, strict=True)
            ]

        names = [f"{sample.key}#{n}" for n, (sample, _) in enumerate(self.questions)]
        entries = work_through(names, folder, predict, batch=model.batch, unit="question")
        predictions, answers = [entry["answer"] for entry in entries], [entry["answers"] for entry in entries]
        if self.lemmas:
            predictions, answers = lemmatised(predictions), [lemmatised(given) for given in answers]
        scores = answer_scores(predictions, answers)
        per_type: dict[str, list[float]] = {}
        for entry, score, (_, question) in zip(entries, scores, self.questions, strict=True):
            entry["score"] = score
            per_type.setdefault(question.kind or answer_type(question.answers), []).append(score)
        majority = majority_answer(answers)
        metrics = {
            **measure(["accuracy"], predictions, answers),
            "per_type": {kind: 100.0 * sum(each) / len(each) for kind, each in sorted(per_type.items())},
            "majority": measure(["accuracy"], [majority] * len(answers), answers)["accuracy"],
        }
        several = several_people(answers)
        rule = "official VQA accuracy over several people's answers" if several else "exact match after normalising"
        rule += ", on the base forms of words (simplemma)" if self.lemmas else ""
        return Outcome(metrics, entries, notes=(rule, f"majority answer: {majority!r}"))

    def example(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A prediction as the page shows it."""
        return {
            "text": entry["answer"],
            "question": entry["question"],
            "references": sorted(set(entry["answers"])),
        }


def questions_of(data: Collection) -> list[tuple[Sample, Question]]:
    """(image, question) of a data set.

    Raises:
        DataError: no questions in it, or one without an answer.
    """
    questions = [(sample, question) for sample in data.samples for question in sample.questions]
    if not questions:
        raise DataError(f"{data.name}: no questions in it")
    bare = next(((sample, question) for sample, question in questions if not question.answers), None)
    if bare is not None:
        raise DataError(f"{data.name}: {bare[0].key} has a question without answers: {bare[1].text!r}")
    return questions


def lemmatised(texts: Sequence[str]) -> list[str]:
    """Texts with every word in its base form.

    Raises:
        ConfigError: simplemma is not installed.
    """
    try:
        from simplemma import lemmatize
    except ImportError:
        raise ConfigError("lemmas need simplemma: pip install simplemma, or give --lemmas off") from None
    return [" ".join(lemmatize(word, lang="en") for word in text.split()) for text in texts]


def _candidates(source: str | None, questions: list[tuple[Sample, Question]]) -> list[str]:
    """Answers to rank: of a file, one per line, or `data` for all that the data set has."""
    if source is None:
        return []
    if source == "data":
        return sorted({answer for _, question in questions for answer in question.answers})
    return read_lines(source, "no candidate answers in it")
