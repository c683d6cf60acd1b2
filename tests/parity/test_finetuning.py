"""Fine-tuning as a user starts it: the image encoder trains, questions enter the Q-Former, the best of dev is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
)

import blip2
from blip2.cli.main import main
from blip2.weights import runs
from blip2.weights.formats import open_checkpoint
from blip2.weights.lazy_tensors import read_safetensors

HF = Callable[[str], tuple[Path, Any]]
COLORS = ("red", "green", "blue", "black", "white", "yellow")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six plain pictures with a caption, and a question with its answer, as a JSONL data set."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number, color in enumerate(COLORS):
        Image.new("RGB", (40, 40), color).save(folder / f"{number}.png")
        asked = [{"question": "what is it", "answers": ["a bird" if number % 2 else "a dog"]}]
        lines.append({"image": f"{number}.png", "captions": ["two cats on the grass", "a dog"], "qa": asked})
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def bridges(hf: HF, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of stage 1, and one of stage 2 that began from it."""
    folder = tmp_path_factory.mktemp("bridges")
    first = blip2.convert(hf("itm")[0], folder / "itm", "blip2").target
    made = {"stage1": folder / "s1", "stage2": folder / "s2"}
    assert main(command("stage1", hf, pictures, made["stage1"], first, "--optim.lr", "1e-3")) == 0
    assert main(command("stage2", hf, pictures, made["stage2"], made["stage1"], "--optim.lr", "1e-3")) == 0
    return made


def command(recipe: str, hf: HF, pictures: Path, out: Path, init: Path | None, *more: str) -> list[str]:
    itm, opt = str(hf("itm")[0]), str(hf("opt")[0])
    towers = ["--vision.name", itm, "--vision.image_size", "56", "--vision.pool", "1", "--qformer.init", itm]
    towers += ["--qformer.queries", "5", "--qformer.embed_dim", "16", "--language.name", opt]
    data = ["--data", str(pictures / "set.jsonl"), "--data.dev", str(pictures / "set.jsonl")]
    data += ["--data.cache_features", "false", "--data.workers", "0", "--train.precision", "fp32"]
    loop = ["--steps", "2", "--batch", "4", "--optim.warmup", "0", "--train.eval_every", "1", "--eval.samples", "2"]
    start = ["--init", str(init)] if init is not None else []
    return ["train", f"tiny/{recipe}", *start, "--out", str(out), *towers, *data, *loop, *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(runs.checkpoints(run)[-1][1] / runs.WEIGHTS)


def dev(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["kind"] == "dev"]


@pytest.mark.parametrize(
    ("recipe", "stage", "best"), [("caption", "stage2", "cider"), ("retrieval", "stage1", "recall")]
)
def test_the_image_encoder_trains_and_is_used(
    recipe: str, stage: str, best: str, hf: HF, bridges: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ("--vision.train", "true", "--optim.lr", "1e-2")
    assert main(command(recipe, hf, pictures, run, bridges[stage], *more)) == 0
    after, before = weights(run), blip2.load(bridges[stage], dtype="fp32").vision.model.state_dict()
    tuned = {n.removeprefix("vision.model."): v for n, v in after.items() if n.startswith("vision.")}
    moved = [name for name, value in tuned.items() if not torch.equal(value, before[name])]
    assert tuned.keys() == before.keys()
    still = {name for name in tuned if name not in moved}
    assert still == {"post_layernorm.weight", "post_layernorm.bias"}  # behind the block that is used
    # what loads is the best of dev, and its encoder is its own
    kept = read_safetensors(run / "best" / runs.WEIGHTS)
    score = json.loads((run / "best" / "score.json").read_text())
    assert score["metric"] == best
    assert score["score"] == max(dev(run, best))
    model = blip2.load(run, dtype="fp32")
    loaded = model.vision.model.state_dict()
    assert all(torch.equal(kept[f"vision.model.{name}"], value) for name, value in loaded.items())
    assert model.vision.frozen
    # it goes on only where it may train further
    assert main(command(recipe, hf, pictures, tmp_path / "next", run, "--vision.train", "false")) == 2


def test_a_fine_tuned_encoder_is_exported(hf: HF, bridges: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--vision.train", "true", "--optim.lr", "1e-2", "--eval.best", "null")
    assert main(command("caption", hf, pictures, run, bridges["stage2"], *more)) == 0
    folder = blip2.convert(run, tmp_path / "hf", "hf").target
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model = blip2.load(run, dtype="fp32")
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        ours = model.stage2.ln_vision(model.vision(pixels))
        want = theirs.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
    blip2.convert(run, tmp_path / "lavis.pth", "lavis")
    back = open_checkpoint(tmp_path / "lavis.pth")
    name = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(back.vision[name].read(), weights(run)[f"vision.model.{name}"])


def test_questions_enter_the_qformer(
    hf: HF, bridges: dict[str, Path], pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    more = ("--optim.lr", "1e-3", "--vision.train", "false")
    assert main(command("vqa", hf, pictures, run, bridges["stage2"], *more)) == 0
    assert f"text branch from {bridges['stage1']}" in capsys.readouterr().err
    before, after = weights(bridges["stage1"]), weights(run)
    text = [n for n in after if n.startswith("qformer.embeddings.") or ".text_ff." in n]
    assert text
    assert set(after) & {"qformer.head.bias", "itm_head.weight", "temp"} == set()
    last = max(int(n.split(".")[2]) for n in text if ".text_ff." in n)
    for name in text:
        change = float((after[name] - before[name]).abs().max() / before[name].abs().max())
        # nobody uses the text outputs of the last layer
        assert change == 0 if f"layers.{last}." in name else 0 < change < 0.1
    model = blip2.load(run, dtype="fp32")
    features = model.features([str(pictures / "0.png")])
    soft = [model.soft_prompts(features, [question]) for question in ("a dog", "the red sofa")]
    assert (soft[0] - soft[1]).abs().max() > 1e-3
    assert len(model.ask([str(pictures / "0.png")], ["what is it"])) == 1
    assert len(dev(run, "accuracy")) == 3
    shown = json.loads((run / "samples" / "step-000002.json").read_text())
    assert shown[0]["caption"].startswith("what is it ")
    exported = blip2.convert(run, tmp_path / "hf", "hf")
    assert any("trained on bare questions" in note for note in exported.notes)
    theirs = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    ids, mask = model.text_tokenizer(["a dog"])
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        want = theirs.get_image_features(pixels, ids, mask.long(), return_dict=True).pooler_output
        torch.testing.assert_close(model.soft_prompts(model.vision(pixels), ["a dog"]), want, rtol=1e-4, atol=1e-4)
    copy = blip2.convert(run, tmp_path / "copy", "blip2").target
    assert read_safetensors(copy / runs.WEIGHTS).keys() == after.keys()


def test_instruction_tuning_on_images_and_films(
    hf: HF, bridges: dict[str, Path], pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    """A stage 2 becomes an InstructBLIP: prompts of captions and questions enter the Q-Former, with several images."""
    frames = [Image.new("RGB", (40, 40), color) for color in COLORS]
    frames[0].save(pictures / "film.gif", save_all=True, append_images=frames[1:])
    asked = {"captions": ["two cats on the grass"], "qa": [{"question": "what is it", "answers": ["a bird"]}]}
    sources = [
        {"image": "0.png"},
        {"images": ["1.png", "2.png"]},
        {"video": "film.gif"},
        {"images": ["3.png", "4.png"]},
    ]
    lines = [json.dumps({**source, **asked}) for source in sources]
    (pictures / "several.jsonl").write_text("\n".join(lines))
    data = ["--data", str(pictures / "several.jsonl"), "--data.dev", str(pictures / "several.jsonl")]
    run, more = tmp_path / "run", ["--optim.lr", "1e-3", "--qformer.image_places", "4", "--vision.token_drop", "0"]
    more += ["--data.texts_per_image", "2", "--vision.frames", "4", "--eval.best", "null", *data]
    assert main(command("instruct", hf, pictures, run, bridges["stage2"], *more)) == 0
    assert f"text branch from {bridges['stage1']}" in capsys.readouterr().err
    after = weights(run)
    assert after["image_places"].abs().max(dim=1).values.gt(0).all()
    model = blip2.load(run, dtype="fp32")
    film = str(pictures / "film.gif")
    options = {"beams": 2, "min_tokens": 2, "max_tokens": 6}
    assert isinstance(model.answer(film, "what is it", **options), str)
    shown = json.loads((run / "samples" / "step-000002.json").read_text())
    assert len(shown) == 2
    # it is the film model of transformers, and what that has no place for comes back
    assert any("InstructBlipVideo" in note for note in blip2.convert(run, tmp_path / "hf", "hf").notes)
    assert InstructBlipVideoForConditionalGeneration.from_pretrained(tmp_path / "hf").config.video_token_id
    back = open_checkpoint(tmp_path / "hf")
    assert {n: t.read().tolist() for n, t in back.tensors.items()} == {n: t.tolist() for n, t in after.items()}
    assert main(["convert", str(run), str(tmp_path / "x.pth"), "--to", "lavis"]) == 2
    assert "learned marks of an image's place, for which LAVIS has no place" in capsys.readouterr().err
    # a cache holds no films
    assert main([*command("instruct", hf, pictures, tmp_path / "c", run, *more), "--data.cache_features", "true"]) == 2
    assert "they are for stage 2, with --data.cache_features false" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["instruct-llama", "instruct-t5", "video-llama"])
def test_an_instructblip_of_transformers_trains_on(
    kind: str, hf: HF, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    """Its text branch is its own; what was trained goes back to the class that it came from."""
    source, run = str(hf(kind)[0]), tmp_path / "run"
    towers = ["--vision.name", source, "--qformer.init", source, "--language.name", source]
    more = ["--optim.lr", "1e-3", "--vision.token_drop", "0", "--eval.best", "null", *towers]
    more += ["--vision.frames", "4"] if kind.startswith("video") else []
    assert main(command("instruct", hf, pictures, run, hf(kind)[0], *more)) == 0
    said = capsys.readouterr().err
    assert "95 tensors from" in said
    assert "text branch from" not in said
    before, after = open_checkpoint(source).tensors, weights(run)
    assert before.keys() == after.keys()
    assert not torch.equal(before["qformer.embeddings.word.weight"].read(), after["qformer.embeddings.word.weight"])
    folder = blip2.convert(run, tmp_path / "hf", "hf").target
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(hf(kind)[1]).__name__]


def test_adapters_on_the_qformer(hf: HF, bridges: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """Its own weights stay, also in a resumed run; what loads and what is exported has the adapters in its weights."""
    run, more = tmp_path / "run", ["--optim.lr", "1e-2", "--vision.token_drop", "0", "--lora.qformer_rank", "2"]
    more += ["--eval.best", "null"]
    assert main(command("instruct", hf, pictures, run, bridges["stage2"], *more)) == 0
    before, after = weights(bridges["stage2"]), weights(run)
    for name, value in before.items():
        moved = name == "qformer.query_tokens" or not name.startswith("qformer.")
        assert torch.equal(after[name], value) != moved, name
    adapters = {name for name in after if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in adapters} == {"lora_A", "lora_B"}
    name = "qformer.layers.0.cross_attention.key"
    assert after[f"{name}.lora_B"].abs().max() > 0
    model = blip2.load(run, dtype="fp32")
    merged = after[f"{name}.weight"] + 8.0 * after[f"{name}.lora_B"] @ after[f"{name}.lora_A"]
    torch.testing.assert_close(model.stage2.qformer.get_parameter(name.removeprefix("qformer.") + ".weight"), merged)
    assert not any(".lora_" in name for name in model.stage2.qformer.state_dict())
    folder = blip2.convert(run, tmp_path / "hf", "hf").target
    theirs = InstructBlipForConditionalGeneration.from_pretrained(folder).eval()
    pixels, (ids, mask) = torch.randn(1, 3, 56, 56), model.text_tokenizer(["a dog"])
    with torch.no_grad():
        want = theirs.get_image_features(pixels, ids, mask.long(), return_dict=True).pooler_output
        torch.testing.assert_close(model.soft_prompts(model.vision(pixels), ["a dog"]), want, rtol=1e-4, atol=1e-4)
    blip2.convert(run, tmp_path / "x.pth", "lavis")
    read = open_checkpoint(tmp_path / "x.pth").tensors
    torch.testing.assert_close(read[f"{name}.weight"].read(), merged)
    kept = blip2.convert(run, tmp_path / "copy", "blip2").target
    assert read_safetensors(kept / runs.WEIGHTS).keys() == after.keys()
    assert main(command("instruct", hf, pictures, run, bridges["stage2"], *more, "--steps", "3")) == 0
    resumed = weights(run)
    assert torch.equal(resumed[f"{name}.weight"], before[f"{name}.weight"])
    assert not torch.equal(resumed[f"{name}.lora_A"], after[f"{name}.lora_A"])
    # and on from it
    assert main(command("instruct", hf, pictures, tmp_path / "next", run, *more)) == 0


def test_a_linear_bridge_trains_and_loads(hf: HF, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--qformer.bridge", "linear", "--qformer.queries", "4", "--optim.lr", "1e-3")
    assert main(command("stage2", hf, pictures, run, None, *more)) == 0
    assert {name.split(".")[0] for name in weights(run)} == {"ln_vision", "language_proj"}
    model = blip2.load(run, dtype="fp32")
    features = model.features([str(pictures / "0.png")])
    patches = model.stage2.ln_vision(features)[:, 1:].unflatten(1, (4, 4))
    quarters = [patches[:, r : r + 2, c : c + 2].mean(dim=(1, 2)) for r in (0, 2) for c in (0, 2)]
    want = model.stage2.language_proj(torch.stack(quarters, dim=1))
    torch.testing.assert_close(model.soft_prompts(features), want, rtol=1e-4, atol=1e-4)
    assert isinstance(model.caption([str(pictures / "0.png")])[0], str)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["--vision.train", "true", "--data.cache_features", "true"], "data.cache_features is True"),
        (["--eval.best", "accuracy"], "eval.best is 'accuracy': it must be one of loss, cider here"),
        (
            ["--qformer.question", "true"],
            "qformer.instruction is 'question': it must be prompt or null unless data.texts is questions",
        ),
        (["--init_text", "runs/s1"], "init_text is 'runs/s1': it must be null without init and qformer.instruction"),
        (["--qformer.bridge", "linear", "--qformer.queries", "5"], "qformer.queries is 5: it must be a square"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: list[str], told: str, hf: HF, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(command("stage2", hf, pictures, tmp_path / "run", None, *settings)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
