"""Examples in front of captions and answers, on tiny random checkpoints of both kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.cli.main import main
from blip2.errors import ConfigError, DataError
from blip2.inference.few_shot import Examples

HF = Callable[[str], tuple[Path, Any]]
OPTIONS: dict[str, Any] = {"beams": 2, "min_tokens": 3, "max_tokens": 6}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(6):
        Image.fromarray(rng.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a photo of a {('dog', 'bird')[n % 2]} on the sofa\n")
    return [folder / f"{n}.png" for n in range(6)]


def shots(pictures: list[Path]) -> list[dict[str, Any]]:
    return [
        {"image": pictures[0], "question": "what is it?", "answer": "a dog"},
        {"image": pictures[1], "caption": "two cats sleep"},
        {"image": pictures[2], "question": "what is it?", "answer": "a bird"},
    ]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_answers_are_those_of_the_whole_sequence(kind: str, hf: HF, pictures: list[Path]) -> None:
    """Token by token as transformers writes after embeddings joined here by hand."""
    model = blip2.load(str(hf(kind)[0]), dtype="fp32")
    language, tokenizer = model.stage2.language_model, model.language_tokenizer  # type: ignore[union-attr]
    found = model.ask(pictures[3:], "what is it?", shots=shots(pictures), **OPTIONS)
    template = model.config.language.question
    texts = [template.format("what is it?") + " a dog", f"{model.config.language.prompt} two cats sleep"]
    texts += [template.format("what is it?") + " a bird"]
    pieces: list[torch.Tensor] = []
    with torch.no_grad():
        for n, text in enumerate(texts):
            ids = [*tokenizer._plain(text), tokenizer.end_id]
            ids = [*tokenizer._front, *ids] if kind == "opt" and n == 0 else ids
            pieces += [model.soft_prompts(model.features(pictures[n]))[0], language.embed(torch.tensor(ids))]
        asked = tokenizer.prompts([template.format("what is it?")])[0][0, 1 if kind == "opt" else 0 :]
        for n, answer in enumerate(found):
            own = [model.soft_prompts(model.features(pictures[3 + n]))[0], language.embed(asked)]
            whole = torch.cat(pieces + own)[None]
            out = language.model.generate(
                inputs_embeds=whole,
                attention_mask=torch.ones(whole.shape[:2], dtype=torch.int64),
                num_beams=2,
                min_new_tokens=3,
                max_new_tokens=6,
                length_penalty=-1.0,
                eos_token_id=tokenizer.end_id,
                pad_token_id=tokenizer.pad_id,
            )
            assert answer == tokenizer.decode(out[0].tolist()[int(kind == "t5") :])


def test_order_of_examples_matters_and_none_is_no_change(hf: HF, pictures: list[Path]) -> None:
    model = blip2.load(str(hf("opt")[0]), dtype="fp32")
    given = shots(pictures)
    plain = model.caption(pictures, **OPTIONS)
    free = {"beams": 1, "min_tokens": 20, "max_tokens": 20, "repetition_penalty": 3.0}
    swapped = [model.caption(pictures, shots=s, **free) for s in (given, given[::-1], [])]
    assert len({tuple(captions) for captions in swapped}) == 3
    first = model.caption(pictures, shots=given, **OPTIONS)
    assert model.caption(pictures, shots=[], **OPTIONS) == plain
    examples = Examples(model, given)
    assert model.caption(pictures[:1], shots=examples, **OPTIONS) == first[:1]
    assert model.ask_many(pictures[:2], ["what?", "how many?"], shots=examples, **OPTIONS) == [
        [model.ask(p, q, shots=given, **OPTIONS)[0] for q in ("what?", "how many?")] for p in pictures[:2]
    ]


def test_refusals(hf: HF, pictures: list[Path]) -> None:
    model = blip2.load(str(hf("opt")[0]), dtype="fp32")
    with pytest.raises(DataError, match='shot 1: "answer" is not a text'):
        model.ask(pictures[0], "what?", shots=[{"image": pictures[0], "question": "what?"}])
    with pytest.raises(ConfigError, match="9 shots are .* tokens, and the language model reads 96: give fewer"):
        model.ask(pictures[0], "what?", shots=shots(pictures) * 3)
    stage1 = blip2.load(str(hf("itm")[0]), dtype="fp32")
    with pytest.raises(ConfigError, match="shots need a stage-2 run"):
        stage1.caption(pictures[0], shots=shots(pictures))


def test_command_line(hf: HF, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(hf("opt")[0])
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(s | {"image": str(s["image"])}) + "\n" for s in shots(pictures)))
    model = blip2.load(folder, dtype="fp32")
    ask = ["ask", str(pictures[3]), "what is it?", "--model", folder, "--dtype", "fp32", "--beams", "2"]
    assert main([*ask, "--shots", str(file)]) == 0
    expected = model.ask(pictures[3], "what is it?", shots=shots(pictures), beams=2)[0]
    assert capsys.readouterr().out == f"{expected}\n"
    caption = ["caption", str(pictures[4]), "--model", folder, "--dtype", "fp32", "--beams", "2", "--json"]
    assert main([*caption, "--max-tokens", "9", "--shots", str(file)]) == 0
    expected = model.caption(pictures[4], shots=shots(pictures), beams=2, max_tokens=9)[0]
    assert json.loads(capsys.readouterr().out)["captions"] == [expected]
    file.write_text('{"image": "nowhere.png", "caption": "a"}\n')
    assert main([*ask, "--shots", str(file)]) == 2
    assert f"{tmp_path / 'nowhere.png'}: No such file" in capsys.readouterr().err
    assert main([*ask, "--shots", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: cannot be read: No such file or directory" in capsys.readouterr().err


def test_evaluation(hf: HF, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two examples of other data in front of every image; the settings name them."""
    train, dev = tmp_path / "train", tmp_path / "dev"
    for folder, chosen in ((train, pictures[:3]), (dev, pictures[3:])):
        folder.mkdir()
        for path in chosen:
            for file in (path, path.with_suffix(".txt")):
                (folder / file.name).write_bytes(file.read_bytes())
    model = str(hf("opt")[0])
    command = ["evaluate", "caption", "--model", model, "--data", str(dev), "--dtype", "fp32", "--beams", "1"]
    command += ["--max-tokens", "9", "--json", "--shots", "2"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 2
    assert "has no train split to draw examples from: give --shots-data" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "a"), "--shots-data", str(dev)]) == 2
    assert "the evaluated data itself" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "a"), "--shots-data", str(train)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["settings"]["shots"] == 2
    keys = result["settings"]["shots_keys"]
    assert set(keys) < {"0", "1", "2"}
    given = [{"image": train / f"{k}.png", "caption": (train / f"{k}.txt").read_text().strip()} for k in keys]
    expected = blip2.load(model, dtype="fp32").caption(pictures[3:], shots=given, beams=1, max_tokens=9)
    lines = (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["caption"] for line in lines] == expected
    assert main([*command, "--out", str(tmp_path / "a"), "--shots-data", str(train), "--shots-seed", "9"]) == 2
    assert "is an evaluation with shots" in capsys.readouterr().err
