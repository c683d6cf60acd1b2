"""The adapter for lmms-eval, driven by that package itself: its command line on a task of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import blip2
from blip2.configs import DecodingConfig
from blip2.errors import ConfigError

if find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed (it needs torchvision by its own account)", allow_module_level=True)

HF = Callable[[str], tuple[Path, Any]]
QUESTIONS = ("Question: what is it? Answer:", "a photo of")
TASK = """\
task: mini
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/set.json
test_split: test
output_type: generate_until
doc_to_visual: !function mini.visual
doc_to_text: !function mini.text
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 5
  num_beams: 2
  do_sample: false
  temperature: 0
  until: ["\\n"]
process_results: !function mini.results
metric_list:
  - metric: said
    aggregation: !function mini.first
    higher_is_better: true
"""
HELPERS = """\
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"said": len(results[0])}

def first(values):
    return sum(values)
"""


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    made = []
    for number, color in enumerate(("red", "green", "blue")):
        made.append(tmp_path / f"{number}.png")
        Image.new("RGB", (40, 40), color).save(made[-1])
    return made


def test_its_command_line_runs_a_task(hf: HF, pictures: list[Path], tmp_path: Path) -> None:
    rows = [{"image": str(p), "question": QUESTIONS[n % 2], "answer": "a"} for n, p in enumerate(pictures)]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    (tmp_path / "mini.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "mini.py").write_text(HELPERS)
    model = str(hf("opt")[0])
    command = [sys.executable, "-m", "lmms_eval", "--model", "blip2", "--tasks", "mini"]
    command += ["--model_args", f"pretrained={model},dtype=fp32"]
    command += ["--include_path", str(tmp_path), "--batch_size", "2", "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True, timeout=280, env=environment
    )
    found = list((tmp_path / "out").rglob("*samples_mini.jsonl"))
    assert found, done.stderr[-3000:]
    logged = sorted((json.loads(line) for line in found[0].read_text().splitlines()), key=lambda line: line["doc_id"])
    ours = blip2.load(model, dtype="fp32")
    decoding = DecodingConfig(beams=2, min_tokens=0, max_tokens=5)
    want = [ours.generate(ours.features([str(r["image"])]), [r["question"]], decoding)[0][0] for r in rows]
    assert [line["filtered_resps"] for line in logged] == want


def test_likelihoods_and_refusals(hf: HF, pictures: list[Path]) -> None:
    from blip2.evaluation.lmms_eval import Blip2Lmms, cut, decoding_of

    model = Blip2Lmms(str(hf("opt")[0]), dtype="fp32", batch_size=2)
    model.task_dict = {"mini": {"test": [[Image.open(p)] for p in pictures]}}

    def request(number: int, wanted: Any, visual: Any = lambda doc: doc) -> Any:
        return SimpleNamespace(args=("what is it?", wanted, visual, number, "mini", "test"))

    choices = ["a dog", "two cats"]
    found = model.loglikelihood([request(n, f" {text}") for n in range(3) for text in choices])
    better = [choices[int(found[2 * n + 1][0] > found[2 * n][0])] for n in range(3)]
    plain = replace(model.model.config, language=replace(model.model.config.language, question="{}"))
    model.model.config = plain
    assert better == model.model.rank_answers([str(p) for p in pictures], "what is it?", choices)
    written = model.model.ask([str(pictures[0])], "what is it?", decoding=DecodingConfig(beams=1, min_tokens=0))
    assert model.loglikelihood([request(0, f" {written[0]}")])[0][1]
    with pytest.raises(ConfigError, match="has 2 images, and BLIP-2 sees one"):
        model.generate_until([request(0, {"max_new_tokens": 3}, lambda doc: doc * 2)])
    with pytest.raises(ConfigError, match="tasks of several rounds are not for it"):
        model.generate_until_multi_round([])
    with pytest.raises(ConfigError, match="--model_args beans is unknown"):
        Blip2Lmms(str(hf("opt")[0]), beans=1)
    assert cut("a dog\nand more.", [".", "\n"]) == "a dog"
    assert decoding_of({"temperature": 0, "top_p": None, "num_beams": 3, "until": "x"}) == (
        DecodingConfig(beams=3, min_tokens=0, max_tokens=64),
        ["x"],
    )
    assert decoding_of({"do_sample": True, "temperature": 0.7})[0].sample
