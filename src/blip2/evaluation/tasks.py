"""The three tasks: from a model and a data set to predictions and metrics.

Shape letters: I images, T texts, Q queries, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from blip2.configs import DecodingConfig
from blip2.data.collection import Collection, Question, Sample
from blip2.data.few_shot import Shot
from blip2.errors import ConfigError, DataError
from blip2.evaluation.prediction_log import Folder, work_through
from blip2.inference import Blip2
from blip2.inference.few_shot import Examples
from blip2.metrics import vqa
from blip2.metrics.captioning import bleu, cider, cider_per_image, rouge_l
from blip2.metrics.coco_caption import official_scores
from blip2.metrics.retrieval import (
    bidirectional_recall,
    candidate_pairs,
    fill_with_similarity,
    recall_at_k,
    reranked_scores,
    retrieval_ranks,
)
from blip2.ops import distributed
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import to_list, to_numpy

Entries = list[dict[str, Any]]

# Bytes of image features that retrieval keeps from ITC for ITM.
KEPT_FEATURES = 2_000_000_000


@dataclass(frozen=True)
class Outcome:
    """What a task measured.

    Args:
        metrics: by name, nested for retrieval; None where a metric could not be had.
        missing: why, by metric.
        entries: per-sample predictions, each with `score` (higher is better) where it has one.
        n: samples.
        notes: lines for the table.
    """

    metrics: dict[str, Any]
    missing: dict[str, str]
    entries: Entries
    n: int
    notes: tuple[str, ...] = ()


# -- captioning -----------------------------------------------------------------------------------


def require_captions(data: Collection) -> None:
    """Refuse a data set in which an image has no caption, before anything is computed."""
    bare = next((s for s in data.samples if not s.captions), None)
    if bare is not None:
        raise DataError(f"{data.name}: {bare.key} has no caption to compare with")


def caption(
    model: Blip2,
    data: Collection,
    folder: Folder,
    decoding: DecodingConfig,
    prompt: str | None,
    shots: Sequence[Shot] = (),
) -> Outcome:
    """Caption every image, the same examples in front of each, and score against all its references."""
    examples = Examples(model, shots) if shots else ()

    def predict(chunk: list[int]) -> Entries:
        samples = [data.samples[i] for i in chunk]
        captions = model.caption([s.read() for s in samples], prompt=prompt, decoding=decoding, shots=examples)
        return [{"caption": c, "references": list(s.captions)} for c, s in zip(captions, samples, strict=True)]

    entries = work_through(_ids(data.samples), folder, predict, batch=model.batch, what="image")
    candidates, references = [e["caption"] for e in entries], [e["references"] for e in entries]
    official, missing = official_scores(candidates, references)
    own: dict[str, Any] = {
        **bleu(candidates, references),
        "rouge_l": rouge_l(candidates, references),
        "cider": cider(candidates, references),
    }
    for entry, score in zip(entries, cider_per_image(candidates, references), strict=True):
        entry["score"] = score
    names = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider", "spice")
    notes = [f"{len(set(candidates))} distinct captions of {len(candidates)}"]
    if official:
        notes.append(f"official scorers for {', '.join(official)}; the rest, if any, by blip2's own")
        notes.append(f"blip2's own CIDEr {own['cider']:.2f}, BLEU-4 {own['bleu4']:.2f} (another tokeniser)")
    else:
        notes.append("BLEU, ROUGE-L and CIDEr by blip2's own scorers, whose tokeniser differs in rare cases")
    metrics = {name: official.get(name, own.get(name)) for name in names}
    missing = {name: reason for name, reason in missing.items() if metrics[name] is None}
    domains = [sample.domain for sample in data.samples]
    if any(domains):
        metrics |= {"per_domain": _per_domain(candidates, references, domains)}
    return Outcome(metrics, missing, entries, len(entries), tuple(notes))


def _per_domain(
    candidates: list[str], references: list[list[str]], domains: list[str | None]
) -> dict[str, dict[str, float | None]]:
    """The metrics of each part of the data set by itself, as NoCaps counts them."""
    out: dict[str, dict[str, float | None]] = {}
    for domain in sorted({domain for domain in domains if domain}):
        said = [c for c, d in zip(candidates, domains, strict=True) if d == domain]
        people = [r for r, d in zip(references, domains, strict=True) if d == domain]
        own: dict[str, float | None] = {"cider": cider(said, people), "bleu4": bleu(said, people)["bleu4"]}
        official, _ = official_scores(said, people)
        out[domain] = {name: official.get(name, own.get(name)) for name in (*own, "spice")}
    return out


# -- visual question answering --------------------------------------------------------------------


def questions_of(data: Collection) -> list[tuple[Sample, Question]]:
    """(image, question) of a data set.

    Raises:
        DataError: no questions in it, or one without an answer.
    """
    found = [(sample, question) for sample in data.samples for question in sample.questions]
    if not found:
        raise DataError(f"{data.name}: no questions in it")
    bare = next(((s, q) for s, q in found if not q.answers), None)
    if bare is not None:
        raise DataError(f"{data.name}: {bare[0].key} has a question without answers: {bare[1].text!r}")
    return found


def answer(
    model: Blip2,
    asked: list[tuple[Sample, Question]],
    folder: Folder,
    decoding: DecodingConfig,
    *,
    shuffled: bool = False,
    candidates: Sequence[str] = (),
    lemmas: bool = False,
    shots: Sequence[Shot] = (),
) -> Outcome:
    """Answer every question.

    Args:
        lemmas: compare the base forms of answers' words, as OK-VQA's were.
        shuffled: show each question another image than its own: what the language alone knows.
        candidates: rank these by their likelihood instead of writing freely.
        shots: examples in front of every image, the same for all.
    """
    examples = Examples(model, shots) if shots else ()
    images = [sample for sample, _ in asked]
    if shuffled:
        images = images[len(images) // 2 :] + images[: len(images) // 2]

    def predict(chunk: list[int]) -> Entries:
        pictures = [images[i].read() for i in chunk]
        texts = [asked[i][1].text for i in chunk]
        if candidates:
            found = model.rank_answers(pictures, texts, candidates)
        else:
            found = model.ask(pictures, texts, decoding=decoding, shots=examples)
        return [
            {"image": images[i].key, "question": asked[i][1].text, "answer": text, "answers": list(asked[i][1].answers)}
            for i, text in zip(chunk, found, strict=True)
        ]

    names = [f"{sample.key}#{n}" for n, (sample, _) in enumerate(asked)]
    entries = work_through(names, folder, predict, batch=model.batch, what="question")
    said, answers = [e["answer"] for e in entries], [e["answers"] for e in entries]
    if lemmas:
        said, answers = lemmatised(said), [lemmatised(found) for found in answers]
    several = any(len(found) > 1 for found in answers)
    scores = vqa.vqa_accuracy(said, answers) if several else vqa.exact_match(said, answers)
    kinds: dict[str, list[float]] = {}
    for entry, score, (_, question) in zip(entries, scores, asked, strict=True):
        entry["score"] = score
        kinds.setdefault(question.kind or vqa.answer_type(question.answers), []).append(score)
    common = vqa.majority_answer(answers)
    blind = vqa.vqa_accuracy if several else vqa.exact_match
    metrics = {
        "accuracy": _percent(scores),
        "per_type": {kind: _percent(found) for kind, found in sorted(kinds.items())},
        "majority": _percent(blind([common] * len(answers), answers)),
    }
    rule = "official VQA accuracy over several people's answers" if several else "exact match after normalising"
    rule += ", on the base forms of words (simplemma)" if lemmas else ""
    return Outcome(metrics, {}, entries, len(entries), (rule, f"majority answer: {common!r}"))


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


def _percent(scores: Sequence[float]) -> float:
    return 100.0 * sum(scores) / len(scores)


# -- retrieval ------------------------------------------------------------------------------------


def retrieve(model: Blip2, data: Collection, folder: Folder, k: int, itc_weight: float) -> Outcome:
    """Rank by ITC, then re-rank the best `k` of both directions by `itc_weight` x ITC + ITM.

    Both directions' candidate pairs are joined and grouped by image: an image is encoded (again where
    features of all are more than `KEPT_FEATURES`) and projected once, and meets all its texts.
    """
    texts = [text for sample in data.samples for text in sample.captions]
    owners = np.array([n for n, sample in enumerate(data.samples) for _ in sample.captions])
    queries_IQE, kept = _embed(data.samples, model)
    similarity_IT = to_numpy(query_text_similarity(queries_IQE, model.embed_texts(texts)))
    pairs = candidate_pairs(similarity_IT, k)

    def predict(chunk: list[int]) -> Entries:
        found = {i: kept[i] for i in chunk if i in kept}
        if missing := [i for i in chunk if i not in kept]:
            found |= zip(missing, model.features([data.samples[i].read() for i in missing]), strict=True)
        return [_matches(model, found[i][None].to(model.device), texts, pairs[i]) for i in chunk]

    entries = work_through(_ids(data.samples), folder, predict, batch=model.batch, what="image")
    matches = [(np.array(entry["texts"], np.int64), np.array(entry["itm"], np.float32)) for entry in entries]
    scored = reranked_scores(similarity_IT, matches, k, itc_weight)
    by_image_IT, by_text_IT = (fill_with_similarity(scores_IT, similarity_IT) for scores_IT in scored)
    metrics = {
        "itc": recall_at_k(similarity_IT, owners),
        "reranked": bidirectional_recall(by_image_IT, by_text_IT, owners),
    }
    ranks, _ = retrieval_ranks(by_image_IT, owners)
    for entry, sample, rank, scores in zip(entries, data.samples, ranks, by_image_IT, strict=True):
        entry |= {"found": texts[int(scores.argmax())], "references": list(sample.captions), "rank": int(rank)}
        entry["score"] = -float(rank)
    notes = [f"{len(data.samples)} images, {len(texts)} texts, {sum(map(len, pairs))} pairs matched"]
    if not model.has_itm:
        notes.append("this model was trained without ITM: what is re-ranked means nothing")
    return Outcome(metrics, {}, entries, len(data.samples), tuple(notes))


def _matches(model: Blip2, features_1PC: Tensor, texts: list[str], chosen: npt.NDArray[np.int64]) -> dict[str, Any]:
    """ITM class-1 logits of one image with its candidate texts."""
    kv = model.image_kv(features_1PC)
    size = 8 * model.batch  # texts are many and short
    meant = [texts[t] for t in chosen]
    logits = [model.match_logits(kv, meant[start : start + size]) for start in range(0, len(meant), size)]
    return {"texts": to_list(chosen), "itm": [round(v, 6) for v in to_list(torch.cat(logits)[:, 1])]}


def _embed(samples: list[Sample], model: Blip2) -> tuple[Tensor, dict[int, Tensor]]:
    """Query embeddings [I, Q, E], with a progress bar, and the features [P, C] of the images that there is room for.

    ITC wants every image before the first pair is matched.
    """
    embedded, kept, used = [], dict[int, Tensor](), 0
    with tqdm(total=len(samples), unit="image", desc="embedding", disable=distributed.rank() > 0) as bar:
        for start in range(0, len(samples), model.batch):
            chunk = samples[start : start + model.batch]
            features_BPC = model.features([sample.read() for sample in chunk])
            embedded.append(model.embed_features(features_BPC))
            used += features_BPC.nbytes
            if used <= KEPT_FEATURES:
                kept |= dict(enumerate(features_BPC.to("cpu"), start))
            bar.update(len(chunk))
    return torch.cat(embedded), kept


def _ids(samples: list[Sample]) -> list[str]:
    """Keys, made different where a data set repeats one."""
    seen: dict[str, int] = {}
    out = []
    for sample in samples:
        seen[sample.key] = seen.get(sample.key, 0) + 1
        out.append(sample.key if seen[sample.key] == 1 else f"{sample.key}~{seen[sample.key]}")
    return out


def decoding_settings(decoding: DecodingConfig) -> dict[str, Any]:
    """What of the decoding can move a number."""
    return asdict(decoding)
