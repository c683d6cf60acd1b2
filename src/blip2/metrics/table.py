"""Every metric of generated text, one line each: `evaluate`, dev evaluation and the reports of a run read this table.

A new one is a function of predictions and references in a file of this room, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from blip2.metrics.captioning import bleu, cider, rouge_l
from blip2.metrics.vqa import accuracy

References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Metric:
    """A score of texts against references, in percent; higher is better.

    Args:
        label: its name in reports.
        scores: from one prediction and the references per image to scores by key, this metric's among them; None
            where only the official scorers (`coco_caption`) have it.
    """

    label: str
    scores: Callable[[Sequence[str], References], dict[str, float]] | None = None


CAPTION = {
    **{f"bleu{n}": Metric(f"BLEU-{n}", bleu) for n in (1, 2, 3, 4)},
    "meteor": Metric("METEOR"),
    "rouge_l": Metric("ROUGE-L", lambda predictions, references: {"rouge_l": rouge_l(predictions, references)}),
    "cider": Metric("CIDEr", lambda predictions, references: {"cider": cider(predictions, references)}),
    "spice": Metric("SPICE"),
}
VQA = {"accuracy": Metric("Accuracy", lambda predictions, answers: {"accuracy": accuracy(predictions, answers)})}
METRICS = CAPTION | VQA


def measure(names: Iterable[str], predictions: Sequence[str], references: References) -> dict[str, float]:
    """Scores by metric in percent, of those named that have a scorer of blip2's own; each scorer runs once.

    Raises:
        ValueError: as the scorers: no predictions, or one without references.
    """
    wanted = [name for name in names if METRICS[name].scores]
    scorers = dict.fromkeys(METRICS[name].scores for name in wanted)
    scores = {key: value for scorer in scorers if scorer for key, value in scorer(predictions, references).items()}
    return {name: scores[name] for name in wanted}
