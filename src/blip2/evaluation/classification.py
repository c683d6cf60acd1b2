"""`blip2 evaluate classify`: zero-shot classification, an image against the name of every class by ITC.

Shape letters: K classes, T templates, E contrastive width.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from blip2.data.collection import Collection
from blip2.errors import ConfigError, DataError
from blip2.evaluation.inputs import read_lines
from blip2.evaluation.prediction_log import Entries, Folder, work_through
from blip2.evaluation.report import Outcome
from blip2.inference import Blip2
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import to_list

TEMPLATES = ("a photo of {}", "a picture of {}", "{}")
_TOP = 5


class Classification:
    """Name the class of every image: the class whose texts are the most similar (arXiv 2103.00020, section 3.1).

    A class is the mean of its templates' embeddings. Classes are the labels of the data, or those of a file.

    Raises:
        ConfigError: a template without exactly one `{}`.
        DataError: an image without label, one whose label is no class, or fewer than two classes.
    """

    def __init__(self, options: argparse.Namespace, data: Collection) -> None:
        self.templates = tuple(options.template or TEMPLATES)
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError(f"--template {template!r}: it needs one {{}}, where the class is put")
        bare = next((sample for sample in data.samples if not sample.label), None)
        if bare is not None:
            raise DataError(f'{data.name}: {bare.key} has no label: classes need "label": "..." in each JSON object')
        labels = [str(sample.label) for sample in data.samples]
        named = read_lines(options.classes, "no class in it") if options.classes else labels
        self.classes = list(dict.fromkeys(named))
        if unknown := next((label for label in labels if label not in self.classes), None):
            raise DataError(
                f"{options.classes}: {unknown!r} of {data.name} is not among its {len(self.classes)} classes"
            )
        if len(self.classes) < 2:
            raise DataError(f"{data.name}: all images are {self.classes[0]!r}: --classes FILE gives other classes")
        self.data, self.labels = data, labels

    def settings(self, model: Blip2) -> dict[str, Any]:
        """What of the options can move the numbers."""
        return {"classes": len(self.classes), "templates": list(self.templates)}

    def run(self, model: Blip2, folder: Folder) -> Outcome:
        """Classify the images that are not in the folder yet, and count all."""
        samples, classes_KE = self.data.samples, self._embed_classes(model)

        def predict(chunk: list[int]) -> Entries:
            embedded_BQE = model.embed_features(model.features([samples[n].read() for n in chunk]))
            similarity_BK = query_text_similarity(embedded_BQE, classes_KE)
            return [self._entry(row_K, self.labels[n]) for row_K, n in zip(similarity_BK, chunk, strict=True)]

        entries = work_through([sample.key for sample in samples], folder, predict, batch=model.batch, unit="image")
        metrics: dict[str, Any] = {f"top{k}": _percent(entry["rank"] <= k for entry in entries) for k in (1, _TOP)}
        by_class = [
            _percent(entry["rank"] == 1 for entry in entries if entry["label"] == label)
            for label in dict.fromkeys(self.labels)
        ]
        metrics["top1_class_mean"] = sum(by_class) / len(by_class)
        mistakes = Counter((e["label"], e["best"][0]) for e in entries if e["rank"] > 1)
        notes = [f"{len(self.classes)} classes, chance {100 / len(self.classes):.1f}; {len(self.templates)} templates"]
        notes += [f"{label} called {name}: {count}" for (label, name), count in mistakes.most_common(5) if count > 1]
        return Outcome(metrics, entries, notes=tuple(notes))

    def example(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A prediction as the page shows it."""
        return {
            "text": ", ".join(entry["best"]),
            "references": [entry["label"]],
            "score": f"right class at rank {entry['rank']}",
        }

    def _embed_classes(self, model: Blip2) -> Tensor:
        """[K, E] of unit norm."""
        texts = [template.format(name) for name in self.classes for template in self.templates]
        texts_KTE = model.embed_texts(texts).unflatten(0, (len(self.classes), len(self.templates)))
        return F.normalize(texts_KTE.mean(dim=1), dim=-1)

    def _entry(self, similarity_K: Tensor, label: str) -> dict[str, Any]:
        order = to_list(similarity_K.argsort(descending=True, stable=True))
        rank = 1 + order.index(self.classes.index(label))
        best = order[:_TOP]
        return {
            "label": label,
            "best": [self.classes[k] for k in best],
            "similarity": [round(value, 5) for value in to_list(similarity_K[best])],
            "rank": rank,
            "score": -float(rank),
        }


def _percent(hits: Any) -> float:
    values = list(hits)
    return 100 * sum(values) / len(values)
