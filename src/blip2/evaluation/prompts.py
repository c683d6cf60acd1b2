"""`blip2 evaluate prompts`: instructed generation, the same prompts on the same images side by side over models."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2 import __version__
from blip2.configs import DecodingConfig
from blip2.data.collection import Collection
from blip2.data.sources import open_collection
from blip2.errors import ConfigError, DataError
from blip2.evaluation.prediction_log import Folder, work_through
from blip2.evaluation.report import picture_of
from blip2.evaluation.tasks import Entries, decoding_settings
from blip2.inference import Blip2
from blip2.inference.loading import load_model
from blip2.io.atomic import write_json_lines, write_text
from blip2.io.html import environment
from blip2.ops import distributed
from blip2.ops.devices import pick_device
from blip2.training.parallel import process_group

ANSWERS = "answers.jsonl"


def prompts_command(options: argparse.Namespace) -> int:
    """Every model on every prompt and image; one file with all answers, and a page."""
    prompts = read_prompts(options.prompts)
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit is {options.limit}: it must be 1 or more")
    twice = next((name for name in options.models if options.models.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--models names {twice} twice")
    data = open_collection(f"{options.data}:{options.split}" if options.split else options.data).limited(options.limit)
    folder = Path(options.out or "runs/evaluate/prompts")
    with process_group(pick_device(options.device)):
        columns = [(name, _answers(options, name, n, prompts, data, folder)) for n, name in enumerate(options.models)]
        if distributed.rank() > 0:
            return 0
    rows = side_by_side(columns)
    write_json_lines(folder / ANSWERS, rows)
    page = _write_page(folder, rows, prompts, data, options.models)
    out = sys.stderr if options.json else sys.stdout
    for row in rows[: 3 * len(prompts)]:
        print(f"{row['image']}: {row['prompt']}", file=out)
        for name, text in row["answers"].items():
            print(f"    {name}: {text}", file=out)
    print(f"answers: {folder / ANSWERS}\nreport: {page}", file=out)
    if options.json:
        result = {"task": "prompts", "models": options.models, "data": data.name, "n": len(rows), "prompts": prompts}
        print(json.dumps({**result, "answers": rows}, ensure_ascii=False))
    return 0


def read_prompts(path: str) -> list[str]:
    """Prompts of a file, one per line; `\\n` in a line is a new line.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = [line.strip().replace("\\n", "\n") for line in lines if line.strip()]
    if not found:
        raise DataError(f"{path}: no prompts in it: one per line is expected")
    return found


def side_by_side(columns: Sequence[tuple[str, Entries]]) -> list[dict[str, Any]]:
    """One row per image and prompt, with the answers by model."""
    first = columns[0][1]
    return [
        {
            "image": entry["image"],
            "prompt": entry["prompt"],
            "answers": {name: found[n]["text"] for name, found in columns},
        }
        for n, entry in enumerate(first)
    ]


def _answers(
    options: argparse.Namespace, name: str, number: int, prompts: list[str], data: Collection, folder: Path
) -> Entries:
    """What one model writes, image by image; what is there from an earlier call is not written again."""
    options.model = name
    model, _ = load_model(options)
    decoding = _decoding(options)
    settings = {"blip2": __version__, "model": name, "data": data.name, "prompts": prompts}
    work = Folder(folder / f"model-{number}", {**settings, "batch": model.batch, **decoding_settings(decoding)})
    asked = [(sample, prompt) for sample in data.samples for prompt in prompts]

    def predict(chunk: list[int]) -> Entries:
        texts = _generate(model, [asked[i][0].read() for i in chunk], [asked[i][1] for i in chunk], decoding)
        return [
            {"image": asked[i][0].key, "prompt": asked[i][1], "text": text}
            for i, text in zip(chunk, texts, strict=True)
        ]

    names = [f"{n // len(prompts)}#{n % len(prompts)}" for n in range(len(asked))]
    return work_through(names, work, predict, batch=model.batch, what="answer")


def _generate(model: Blip2, pictures: list[bytes], prompts: list[str], decoding: DecodingConfig) -> list[str]:
    found = model.generate(model.features(pictures), prompts, decoding, questions=prompts)
    return [texts[0] for texts in found]


def _decoding(options: argparse.Namespace) -> DecodingConfig:
    """The paper's for instructed generation: beam 5, up to 50 tokens, unless said otherwise."""
    given = {
        name: getattr(options, name)
        for name in ("beams", "min_tokens", "max_tokens", "length_penalty", "repetition_penalty")
        if getattr(options, name) is not None
    }
    return DecodingConfig(**{"min_tokens": 1, "max_tokens": 50, **given})


def _write_page(
    folder: Path, rows: list[dict[str, Any]], prompts: list[str], data: Collection, models: list[str]
) -> Path:
    pictures = [picture_of(sample) for sample in data.samples]
    images = [
        {"key": rows[start]["image"], "picture": pictures[n], "rows": rows[start : start + len(prompts)]}
        for n, start in enumerate(range(0, len(rows), len(prompts)))
    ]
    page = (
        environment(Path(__file__).parent)
        .get_template("prompts.html.j2")
        .render(images=images, models=models, data=data.name)
    )
    path = folder / "report.html"
    write_text(path, page)
    return path
