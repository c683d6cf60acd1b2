"""`blip2 evaluate caption|vqa|retrieval|classify|prompts`: checks first, then work, then the table and the page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.cli.options import Commands, add_json, add_loading, add_model
from blip2.errors import DataError

if TYPE_CHECKING:
    from blip2.data.collection import Collection
    from blip2.inference import Blip2

METRICS = "metrics.json"


def add_parser(commands: Commands) -> None:
    """`blip2 evaluate TASK`."""
    evaluate = commands.add_parser("evaluate", help="captioning, VQA or retrieval on a data set, as the paper measures")
    tasks = evaluate.add_subparsers(dest="task", metavar="TASK", required=True)
    caption = tasks.add_parser("caption", help="BLEU, METEOR, ROUGE-L, CIDEr, SPICE against all references")
    vqa = tasks.add_parser("vqa", help="VQA accuracy over people's answers, or exact match")
    retrieval = tasks.add_parser("retrieval", help="recall by ITC, and re-ranked by ITM, both ways")
    classify = tasks.add_parser("classify", help="zero-shot classification: the class whose name is the most similar")
    prompts = tasks.add_parser("prompts", help="instructed generation: prompts of a file, side by side over models")
    prompts.add_argument("--prompts", required=True, metavar="FILE", help="one prompt per line")
    prompts.add_argument(
        "--models", required=True, nargs="+", metavar="MODEL", help="one or more, as --model elsewhere"
    )
    for task in (caption, vqa, retrieval, classify, prompts):
        task.add_argument("--data", required=True, help="named set, shards, folder or JSONL file")
        task.add_argument("--split", help="of a named set")
        task.add_argument("--limit", type=int, help="first N images only")
        task.add_argument("--out", metavar="DIR", help="default: runs/evaluate/TASK-MODEL-DATA; resumed where it is")
        add_json(task, "one JSON object last")
        if task is prompts:
            add_loading(task)
        else:
            add_model(task)
        task.set_defaults(run=run)
    for task in (caption, vqa, retrieval, classify):
        task.add_argument("--skip-bad", action="store_true", help="evaluate without the samples that cannot be used")
    for task in (caption, vqa, prompts):
        for option, kind in (
            ("beams", int),
            ("min-tokens", int),
            ("max-tokens", int),
            ("length-penalty", float),
            ("repetition-penalty", float),
        ):
            task.add_argument(f"--{option}", type=kind, help="default: the paper's")
    caption.add_argument("--rerank", type=int, metavar="N", help="of N captions the most similar by ITC (default: 0)")
    caption.add_argument("--prompt", help="text that the caption continues (default: the run's)")
    for task in (caption, vqa):
        task.add_argument("--shots", type=int, default=0, metavar="K", help="put K examples in front of every image")
        task.add_argument(
            "--shots-data", metavar="DATA", help="where they are drawn from (default: the train split of a named set)"
        )
        task.add_argument("--shots-seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")
    vqa.add_argument("--questions", type=int, metavar="N", help="first N questions only")
    vqa.add_argument("--shuffle", action="store_true", help="ask about another image: what the language alone knows")
    vqa.add_argument("--candidates", metavar="FILE|data", help="rank these answers (one per line) instead of writing")
    vqa.add_argument(
        "--lemmas",
        choices=("auto", "on", "off"),
        default="auto",
        help="compare base forms of words; auto does for OK-VQA, whose answers are such (default: %(default)s)",
    )
    classify.add_argument("--classes", metavar="FILE", help="a class per line (default: the labels of the data)")
    classify.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="text with {} for the class; several are averaged (default: a photo of {}, a picture of {}, {})",
    )
    retrieval.add_argument("-k", type=int, default=128, help="candidates re-ranked per query (default: %(default)s)")
    retrieval.add_argument(
        "--itc-weight",
        default="1",
        metavar="W|auto",
        help="of the ITC similarity beside the ITM logit; 1 as LAVIS, auto is 1 / temperature (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate, in every process of a distributed run."""
    from blip2.evaluation.prompts import prompts_command
    from blip2.ops.devices import pick_device
    from blip2.training.parallel import process_group

    if options.task == "prompts":
        return prompts_command(options)
    with process_group(pick_device(options.device)):
        return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> int:
    """One model on one data set."""
    from blip2.data.check import decodable
    from blip2.evaluation.captioning import Captioning
    from blip2.evaluation.classification import Classification
    from blip2.evaluation.inputs import open_data
    from blip2.evaluation.prediction_log import Folder
    from blip2.evaluation.published import published
    from blip2.evaluation.report import table, write_page
    from blip2.evaluation.retrieval import Retrieval
    from blip2.evaluation.vqa import VQA
    from blip2.inference.loading import load_model
    from blip2.io.atomic import write_json
    from blip2.ops import distributed

    # Each refuses what can be known to fail when it is made, before a model is loaded.
    tasks: dict[str, type[Captioning] | type[VQA] | type[Retrieval] | type[Classification]]
    tasks = {"caption": Captioning, "vqa": VQA, "retrieval": Retrieval, "classify": Classification}
    data = open_data(options)
    _refuse_bad(data, skip=options.skip_bad)
    tasks[options.task](options, data)  # before the images are decoded, which takes a while
    data = decodable(data, progress=distributed.rank() == 0)
    _refuse_bad(data, skip=options.skip_bad)
    task = tasks[options.task](options, data)
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
    """A metric over fewer samples than the data set has cannot be compared: that takes `--skip-bad`."""
    from blip2.data.collection import printable

    if not data.samples and data.bad:
        skip = False
    if data.bad and not skip:
        first, total = data.bad[0], len(data.bad) + len(data.samples)
        raise DataError(
            f"{data.name}: {len(data.bad)} of {total} samples cannot be used, the first: {first.key}: {first.reason} "
            f"({printable(first.path)}); --skip-bad leaves them out, `blip2 data check` lists them"
        )


def _settings(model: Blip2, name: str, data: Collection) -> dict[str, Any]:
    """What of the model and the data can move the numbers of any task."""
    from blip2 import __version__

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
