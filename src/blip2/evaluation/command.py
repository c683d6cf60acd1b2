"""`blip2 evaluate caption|vqa|retrieval|prompts`: checks first, then work, then the table and the page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blip2 import __version__
from blip2.configs import DecodingConfig
from blip2.data.collection import Collection
from blip2.data.few_shot import Shot
from blip2.data.sources import open_collection
from blip2.errors import ConfigError, DataError
from blip2.evaluation.prediction_log import Folder
from blip2.evaluation.published import published
from blip2.evaluation.report import write_page
from blip2.evaluation.shots import settings_of_shots, shots_for
from blip2.evaluation.tasks import (
    Outcome,
    answer,
    caption,
    decoding_settings,
    lemmatised,
    questions_of,
    require_captions,
    retrieve,
)
from blip2.inference import Blip2
from blip2.inference.loading import load_model
from blip2.io.atomic import write_json
from blip2.ops import distributed
from blip2.ops.devices import pick_device
from blip2.training.parallel import process_group

METRICS = "metrics.json"


def evaluate_command(options: argparse.Namespace) -> int:
    """Evaluate one model on one data set."""
    with process_group(pick_device(options.device)):
        return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> int:
    data = open_collection(f"{options.data}:{options.split}" if options.split else options.data).limited(options.limit)
    _check(options, data)
    shots = shots_for(options, data)
    model, name = load_model(options)
    settings = _settings(options, model, name, data) | settings_of_shots(options, shots)
    folder = Folder(Path(options.out or _default_out(options, name, data)), settings)
    outcome = _run(options, model, data, folder, shots)
    if distributed.rank() > 0:
        return 0
    reference = published(options.task, name, data.name)
    result = {
        "task": options.task,
        "model": name,
        "data": data.name,
        "n": outcome.n,
        "settings": settings,
        "metrics": _rounded(outcome.metrics),
        "missing": outcome.missing,
        "published": dict(reference),
    }
    write_json(folder.path / METRICS, result)
    page = write_page(folder.path, result, outcome, data)
    out = sys.stderr if options.json else sys.stdout
    print(_table(result, outcome), file=out)
    print(f"predictions: {folder.path / 'predictions.jsonl'}\nreport: {page}", file=out)
    if options.json:
        print(json.dumps(result))
    return 0


def _check(options: argparse.Namespace, data: Collection) -> None:
    """What can be known to fail is refused before a model is loaded."""
    for name in ("limit", "questions", "k"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"{'-' if name == 'k' else '--'}{name} is {value}: it must be 1 or more")
    _refuse_bad(data, skip=options.skip_bad)
    if options.task == "retrieval":
        _weight(options.itc_weight)
    else:
        _decoding(options)
    if options.task == "vqa":
        questions_of(data)
        _candidates(options.candidates, data)
        if _lemmas(options, data):
            lemmatised(["a"])
    else:
        require_captions(data)
    if options.task == "retrieval" and len(data.samples) < 2:
        raise DataError(f"{data.name}: {len(data.samples)} image: retrieval needs two or more")


def _refuse_bad(data: Collection, *, skip: bool) -> None:
    """A number over fewer samples than the data set has is another number: not without being asked for."""
    if data.bad and not skip:
        first, whole = data.bad[0], len(data.bad) + len(data.samples)
        raise DataError(
            f"{data.name}: {len(data.bad)} of {whole} samples cannot be used, the first: {first.key}: {first.reason}; "
            "--skip-bad leaves them out, `blip2 data check` lists them"
        )


def _run(options: argparse.Namespace, model: Blip2, data: Collection, folder: Folder, shots: list[Shot]) -> Outcome:
    if options.task == "caption":
        return caption(model, data, folder, _decoding(options), options.prompt, shots)
    if options.task == "retrieval":
        return retrieve(model, data, folder, options.k, _itc_weight(options, model))
    asked = questions_of(data)[: options.questions]
    listed = _candidates(options.candidates, data)
    options_of = {"shuffled": options.shuffle, "candidates": listed, "lemmas": _lemmas(options, data)}
    return answer(model, asked, folder, _decoding(options), **options_of, shots=shots)


def _lemmas(options: argparse.Namespace, data: Collection) -> bool:
    """Whether words are compared in their base forms: for OK-VQA unless the user says otherwise."""
    if options.lemmas == "auto":
        return "okvqa" in data.name.lower().replace("-", "").replace("_", "")
    return bool(options.lemmas == "on")


def _itc_weight(options: argparse.Namespace, model: Blip2) -> float:
    """The number given, or 1 / temperature of the model for `auto`."""
    weight = _weight(options.itc_weight)
    return model.stage1.itc_scale if weight is None else weight


def _weight(given: str) -> float | None:
    """`--itc-weight` as a number; None for `auto`."""
    try:
        return None if given == "auto" else float(given)
    except ValueError:
        raise ConfigError(f"--itc-weight is {given!r}: it must be a number or auto") from None


def _candidates(source: str | None, data: Collection) -> list[str]:
    """Answers to rank: of a file, one per line, or `data` for all that the data set has."""
    if source is None:
        return []
    if source == "data":
        return sorted({text for _, question in questions_of(data) for text in question.answers})
    try:
        found = [line.strip() for line in Path(source).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not found:
        raise DataError(f"{source}: no candidate answers in it")
    return found


def _decoding(options: argparse.Namespace) -> DecodingConfig:
    """The paper's: captions beam 5, 8 to 30 tokens; answers beam 5, 1 to 10 tokens, length penalty -1."""
    vqa = options.task == "vqa"
    usual = {"min_tokens": 1, "max_tokens": 10, "length_penalty": -1.0} if vqa else {}
    given = {
        name: getattr(options, name)
        for name in ("beams", "min_tokens", "max_tokens", "length_penalty", "repetition_penalty", "rerank")
        if getattr(options, name, None) is not None
    }
    return DecodingConfig(**{**usual, **given})


def _settings(options: argparse.Namespace, model: Blip2, name: str, data: Collection) -> dict[str, Any]:
    """Everything that can move the number."""
    config = model.config
    out: dict[str, Any] = {
        "blip2": __version__,
        "model": name,
        "data": data.name,
        "images": len(data.samples),
        "image_size": model.vision.size,
        "resize": config.vision.resize,
        "batch": model.batch,
        "towers_dtype": str(next(model.vision.parameters()).dtype).removeprefix("torch."),
    }
    if data.bad:
        out["left_out"] = len(data.bad)
    if options.task == "retrieval":
        return {
            **out,
            "k": options.k,
            "itc_weight": round(_itc_weight(options, model), 4),
            "max_text": config.qformer.max_text,
        }
    out |= decoding_settings(_decoding(options))
    if options.task == "caption":
        return {**out, "prompt": config.language.prompt if options.prompt is None else options.prompt}
    extra = {"questions": options.questions, "shuffled": options.shuffle, "candidates": options.candidates}
    extra["lemmas"] = _lemmas(options, data)
    return {**out, "question": config.language.question, **extra}


def _default_out(options: argparse.Namespace, name: str, data: Collection) -> str:
    parts = (options.task, Path(name).name, data.name.rstrip("/").split("/")[-1])
    return "runs/evaluate/" + "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in p) for p in parts)


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    return round(values, 2) if isinstance(values, float) else values


def _table(result: dict[str, Any], outcome: Outcome) -> str:
    """The table for people."""
    lines = [f"{result['task']}: {result['model']} on {result['data']}, {result['n']} samples", ""]
    lines += [f"  {name:<20} {value}" for name, value in result["settings"].items() if name not in ("model", "data")]
    lines += ["", f"  {'metric':<24}{'here':>10}{'paper':>10}"]
    for name, value in _flat(result["metrics"]):
        paper = result["published"].get(name.rsplit(" ", 1)[-1])
        here = "missing" if value is None else f"{value:.2f}"
        lines.append(f"  {name:<24}{here:>10}{'' if paper is None else f'{paper:.1f}':>10}")
    lines += [f"  {name} is missing: {reason}" for name, reason in outcome.missing.items()]
    return "\n".join([*lines, *(f"  {note}" for note in outcome.notes)])


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float | None]]:
    out: list[tuple[str, float | None]] = []
    for name, value in values.items():
        out += _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return out
