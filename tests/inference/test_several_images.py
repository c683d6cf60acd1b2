"""Several images or a film in one question: Python and the command line, on tiny random checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.test_film import write_gif

import blip2
from blip2.cli.main import main
from blip2.configs import DecodingConfig
from blip2.data.film import open_sample
from blip2.errors import ConfigError

HF = Callable[[str], tuple[Path, Any]]
OPTIONS: dict[str, Any] = {"beams": 2, "min_tokens": 2, "max_tokens": 6}
KINDS = ("instruct-llama", "instruct-t5", "opt", "t5")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for n in range(3):
        Image.fromarray(rng.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    return [str(tmp_path / f"{n}.png") for n in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_soft_prompts_follow_each_other(kind: str, hf: HF, pictures: list[str]) -> None:
    model = blip2.load(hf(kind)[0], dtype="fp32")
    [(positions, features)] = model.sample_batches([pictures])
    assert (positions, features.shape[:2]) == ([0], (1, 3))
    soft = model.soft_prompts(features, ["what is it?"])
    each = [model.soft_prompts(model.features(picture), ["what is it?"]) for picture in pictures]
    torch.testing.assert_close(soft, torch.cat(each, dim=1), rtol=1e-4, atol=1e-5)
    question = "what is it?"
    prompt = model.config.language.question.format(question)
    decoding = DecodingConfig.for_answers(**OPTIONS)
    assert model.answer(pictures, question, **OPTIONS) == model._generate(soft, [prompt], decoding)[0][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_samples_of_any_number_of_images_go_together(
    kind: str, batch: int, hf: HF, pictures: list[str], tmp_path: Path
) -> None:
    """What each sample is answered alone, whatever stands beside it."""
    model = blip2.load(hf(kind)[0], dtype="fp32")
    model.batch = batch
    film = write_gif(tmp_path / "film.gif", 8)
    samples = [pictures[0], pictures[:2], film, pictures[2], [pictures[1], pictures[0]], [pictures[1]], pictures[:2]]
    questions = ["what is it?", "how many?", "two cats", "a dog?", "what is it?", "how many?", "a red sofa?"]
    answers = [model.answer(sample, q, **OPTIONS) for sample, q in zip(samples, questions, strict=True)]
    assert model.ask(samples, questions, **OPTIONS) == answers
    captions = [model.caption([sample], **OPTIONS)[0] for sample in samples]
    assert model.caption(samples, **OPTIONS) == captions
    ranked = [model.rank_answers([sample], "what is it?", ["a dog", "it"])[0] for sample in samples]
    assert model.rank_answers(samples, "what is it?", ["a dog", "it"]) == ranked


def test_marks_of_place(hf: HF, pictures: list[str]) -> None:
    """A text with its number, or a learned vector; one image has neither."""
    model = blip2.load(hf("instruct-llama")[0], dtype="fp32")
    assert model.stage2 is not None
    [(_, features)] = model.sample_batches([pictures[:2]])
    plain = model.soft_prompts(features, ["it"])
    one = model.soft_prompts(model.features(pictures[0]), ["it"])
    model.config = replace(model.config, language=replace(model.config.language, image_mark="Image {}:"))
    marked = model.soft_prompts(features, ["it"])
    texts = [model.language_tokenizer._plain(f"Image {n}:") for n in (1, 2)]
    assert texts[0] != texts[1]
    marks = [model.stage2.language_model.embed(torch.tensor(ids))[None] for ids in texts]
    torch.testing.assert_close(marked, torch.cat([marks[0], plain[:, :5], marks[1], plain[:, 5:]], dim=1))
    assert torch.equal(model.soft_prompts(model.features(pictures[0]), ["it"]), one)
    model.config = replace(model.config, language=replace(model.config.language, image_mark=None))
    places = torch.randn(2, plain.shape[-1])
    model.stage2.image_places = torch.nn.Parameter(places)
    torch.testing.assert_close(model.soft_prompts(features, ["it"]), plain + places.repeat_interleave(5, dim=0))
    with pytest.raises(ConfigError, match="3 images, and this model was trained for 2 at most"):
        model.answer(pictures, "it")


def test_more_images_than_the_language_model_reads(hf: HF, pictures: list[str]) -> None:
    model = blip2.load(hf("opt")[0], dtype="fp32")  # 96 positions, 5 a image
    with pytest.raises(ConfigError, match=r"20 images are 100 tokens and the text \d+: the language model reads 96"):
        model.answer(pictures * 6 + pictures[:2], "it", **OPTIONS)
    with pytest.raises(ConfigError, match="captions of them need a stage 2 and no rerank"):
        model.caption([pictures], rerank=2)


def test_commands(hf: HF, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(hf("instruct-llama")[0])
    model = blip2.load(folder, dtype="fp32")
    film = str(write_gif(tmp_path / "film.gif", 8))
    options = ["--model", folder, "--dtype", "fp32"]
    assert main(["ask", *pictures, film, "what is it?", "--json", *options]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["answer"] == model.answer([*pictures, film], "what is it?")
    assert out["image"] == [*pictures, film]
    assert main(["ask", film, "what is it?", "--frames", "2", *options]) == 0
    assert capsys.readouterr().out.strip() == model.answer(open_sample(film, 2), "what is it?")
    assert main(["caption", *pictures, "--together", "--json", *options]) == 0
    together = json.loads(capsys.readouterr().out)
    assert together["captions"] == model.caption([pictures])
    assert main(["caption", film, pictures[0], "--json", *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["captions"] for line in lines] == [[text] for text in model.caption([film, pictures[0]])]
    assert main(["ask", pictures[0], "nowhere.png", "it", *options]) == 2
    assert "nowhere.png: No such file" in capsys.readouterr().err
    assert main(["caption", *pictures, "--together", "--sidecar", *options]) == 2
    assert "--together prints one caption" in capsys.readouterr().err
