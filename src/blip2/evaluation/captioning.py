"""`blip2 evaluate caption`: BLEU, METEOR, ROUGE-L, CIDEr and SPICE of a model's captions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from blip2.configs import DecodingConfig
from blip2.data.collection import Collection
from blip2.data.film import sample_source
from blip2.evaluation.inputs import decoding_options, few_shot_examples, few_shot_settings, require_captions
from blip2.evaluation.prediction_log import Entries, Folder, work_through
from blip2.evaluation.report import Outcome
from blip2.inference import Blip2
from blip2.inference.few_shot import Examples
from blip2.metrics.captioning import cider_per_image
from blip2.metrics.coco_caption import official_scores
from blip2.metrics.table import CAPTION, measure


class Captioning:
    """Caption every image, the same examples in front of each, and score against all its references.

    Raises:
        ConfigError: an option is refused.
        DataError: an image has no caption.
    """

    def __init__(self, options: argparse.Namespace, data: Collection) -> None:
        self.options, self.data = options, data
        self.decoding = DecodingConfig(**decoding_options(options))
        require_captions(data)
        self.shots = few_shot_examples(options, data)

    def settings(self, model: Blip2) -> dict[str, Any]:
        """What of the options can move the numbers."""
        prompt = model.config.language.prompt if self.options.prompt is None else self.options.prompt
        return {**asdict(self.decoding), "prompt": prompt, **few_shot_settings(self.options, self.shots)}

    def run(self, model: Blip2, folder: Folder) -> Outcome:
        """Caption what has no caption in the folder yet, and score all."""
        shots = Examples(model, self.shots) if self.shots else ()
        samples = self.data.samples

        def predict(chunk: list[int]) -> Entries:
            images = [sample_source(samples[n], model.frames) for n in chunk]
            captions = model.caption(images, prompt=self.options.prompt, decoding=self.decoding, shots=shots)
            return [
                {"caption": caption, "references": list(samples[n].captions)}
                for caption, n in zip(captions, chunk, strict=True)
            ]

        entries = work_through([sample.key for sample in samples], folder, predict, batch=model.batch, unit="image")
        captions, references = [entry["caption"] for entry in entries], [entry["references"] for entry in entries]
        for entry, score in zip(entries, cider_per_image(captions, references), strict=True):
            entry["score"] = score
        own = measure(CAPTION, captions, references)
        official, missing = official_scores(captions, references)
        notes = [f"{len(set(captions))} distinct captions of {len(captions)}"]
        if official:
            notes.append(f"official scorers for {', '.join(official)}; the rest, if any, by blip2's own")
            notes.append(f"blip2's own CIDEr {own['cider']:.2f}, BLEU-4 {own['bleu4']:.2f} (another tokeniser)")
        else:
            notes.append("BLEU, ROUGE-L and CIDEr by blip2's own scorers, whose tokeniser differs in rare cases")
        metrics: dict[str, Any] = {name: official.get(name, own.get(name)) for name in CAPTION}
        missing = {name: reason for name, reason in missing.items() if metrics[name] is None}
        domains = [sample.domain for sample in samples]
        if any(domains):
            metrics["per_domain"] = _per_domain(captions, references, domains)
        return Outcome(metrics, entries, missing, tuple(notes))

    def example(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A prediction as the page shows it."""
        return {"text": entry["caption"], "references": entry["references"], "score": f"CIDEr {entry['score']:.0f}"}


def _per_domain(
    captions: Sequence[str], references: Sequence[list[str]], domains: Sequence[str | None]
) -> dict[str, dict[str, float | None]]:
    """The metrics of each part of the data set by itself, as NoCaps counts them."""
    metrics: dict[str, dict[str, float | None]] = {}
    for domain in sorted({domain for domain in domains if domain}):
        rows = [n for n, name in enumerate(domains) if name == domain]
        texts, expected = [captions[n] for n in rows], [references[n] for n in rows]
        own, (official, _) = measure(("cider", "bleu4"), texts, expected), official_scores(texts, expected)
        metrics[domain] = {name: official.get(name, own.get(name)) for name in ("cider", "bleu4", "spice")}
    return metrics
