"""`blip2 evaluate caption|vqa|retrieval`: checks first, then work, then the table and the page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blip2 import __version__
from blip2.data.collection import Collection
from blip2.errors import DataError
from blip2.evaluation.captioning import Captioning
from blip2.evaluation.inputs import open_data
from blip2.evaluation.prediction_log import Folder
from blip2.evaluation.published import published
from blip2.evaluation.report import table, write_page
from blip2.evaluation.retrieval import Retrieval
from blip2.evaluation.vqa import VQA
from blip2.inference import Blip2
from blip2.inference.loading import load_model
from blip2.io.atomic import write_json
from blip2.ops import distributed
from blip2.ops.devices import pick_device
from blip2.training.parallel import process_group

METRICS = "metrics.json"
# Each refuses what can be known to fail when it is made, before a model is loaded.
TASKS: dict[str, type[Captioning] | type[VQA] | type[Retrieval]] = {
    "caption": Captioning,
    "vqa": VQA,
    "retrieval": Retrieval,
}


def evaluate_command(options: argparse.Namespace) -> int:
    """Evaluate one model on one data set."""
    with process_group(pick_device(options.device)):
        return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> int:
    data = open_data(options)
    _refuse_bad(data, skip=options.skip_bad)
    task = TASKS[options.task](options, data)
    model, name = load_model(options)
    settings = _settings(model, name, data) | task.settings(model)
    folder = Folder(Path(options.out or _default_out(options.task, name, data)), settings)
    outcome = task.run(model, folder)
    if distributed.rank() > 0:
        return 0
    result = {
        "task": options.task,
        "model": name,
        "data": data.name,
        "n": len(outcome.entries),
        "settings": settings,
        "metrics": _rounded(outcome.metrics),
        "missing": outcome.missing,
        "published": dict(published(options.task, name, data.name)),
    }
    write_json(folder.path / METRICS, result)
    page = write_page(folder.path, result, outcome, data, task.example)
    out = sys.stderr if options.json else sys.stdout
    print(table(result, outcome), file=out)
    print(f"predictions: {folder.path / 'predictions.jsonl'}\nreport: {page}", file=out)
    if options.json:
        print(json.dumps(result))
    return 0


def _refuse_bad(data: Collection, *, skip: bool) -> None:
    """A number over fewer samples than the data set has is another number: not without being asked for."""
    if data.bad and not skip:
        first, total = data.bad[0], len(data.bad) + len(data.samples)
        raise DataError(
            f"{data.name}: {len(data.bad)} of {total} samples cannot be used, the first: {first.key}: {first.reason}; "
            "--skip-bad leaves them out, `blip2 data check` lists them"
        )


def _settings(model: Blip2, name: str, data: Collection) -> dict[str, Any]:
    """What of the model and the data can move the numbers of any task."""
    return {
        "blip2": __version__,
        "model": name,
        "data": data.name,
        "images": len(data.samples),
        "image_size": model.vision.size,
        "resize": model.config.vision.resize,
        "batch": model.batch,
        "towers_dtype": str(next(model.vision.parameters()).dtype).removeprefix("torch."),
        **({"left_out": len(data.bad)} if data.bad else {}),
    }


def _default_out(task: str, name: str, data: Collection) -> str:
    parts = (task, Path(name).name, data.name.rstrip("/").split("/")[-1])
    return "runs/evaluate/" + "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in p) for p in parts)


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    return round(values, 2) if isinstance(values, float) else values
