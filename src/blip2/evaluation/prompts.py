"""`blip2 evaluate prompts`: instructed generation, the same prompts on the same images side by side over models."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from blip2 import __version__
from blip2.configs import DecodingConfig
from blip2.data.collection import Collection
from blip2.errors import ConfigError
from blip2.evaluation.inputs import decoding_options, open_data, read_lines
from blip2.evaluation.prediction_log import Entries, Folder, work_through
from blip2.evaluation.report import thumbnail
from blip2.inference.loading import load_model
from blip2.io.atomic import write_json_lines
from blip2.io.html import write_page
from blip2.ops import distributed
from blip2.ops.devices import pick_device
from blip2.training.parallel import process_group

ANSWERS = "answers.jsonl"


def prompts_command(options: argparse.Namespace) -> int:
    """Every model on every prompt and image; one file with all answers, and a page."""
    lines = read_lines(options.prompts, "no prompts in it: one per line is expected")
    prompts = [line.replace("\\n", "\n") for line in lines]  # `\n` in a line is a new line
    twice = next((name for name in options.models if options.models.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--models names {twice} twice")
    data = open_data(options)
    folder = Path(options.out or "runs/evaluate/prompts")
    with process_group(pick_device(options.device)):
        columns = [(name, _answers(options, name, n, prompts, data, folder)) for n, name in enumerate(options.models)]
        if distributed.rank() > 0:
            return 0
    rows = [
        {"image": first["image"], "prompt": first["prompt"], "answers": {name: own[n]["text"] for name, own in columns}}
        for n, first in enumerate(columns[0][1])
    ]
    write_json_lines(folder / ANSWERS, rows)
    page = folder / "report.html"
    images = [
        {"key": sample.key, "thumbnail": thumbnail(sample), "rows": rows[n * len(prompts) : (n + 1) * len(prompts)]}
        for n, sample in enumerate(data.samples)
    ]
    write_page(page, Path(__file__).with_name("prompts.html.j2"), images=images, models=options.models, data=data.name)
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


def _answers(
    options: argparse.Namespace, name: str, number: int, prompts: list[str], data: Collection, folder: Path
) -> Entries:
    """What one model writes, image by image; what is there from an earlier call is not written again."""
    options.model = name
    model, _ = load_model(options)
    decoding = DecodingConfig(**{"min_tokens": 1, "max_tokens": 50, **decoding_options(options)})  # the paper's
    settings = {"blip2": __version__, "model": name, "data": data.name, "prompts": prompts, "batch": model.batch}
    log = Folder(folder / f"model-{number}", settings | asdict(decoding))
    tasks = [(sample, prompt) for sample in data.samples for prompt in prompts]

    def predict(chunk: list[int]) -> Entries:
        samples, chosen = zip(*(tasks[n] for n in chunk), strict=True)
        features = model.features([sample.read() for sample in samples])
        texts = model.generate(features, list(chosen), decoding, questions=chosen)
        return [
            {"image": sample.key, "prompt": prompt, "text": best}
            for sample, prompt, (best, *_) in zip(samples, chosen, texts, strict=True)
        ]

    names = [f"{n // len(prompts)}#{n % len(prompts)}" for n in range(len(tasks))]
    return work_through(names, log, predict, batch=model.batch, unit="answer")
