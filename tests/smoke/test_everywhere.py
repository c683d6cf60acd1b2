"""The whole product in both precisions, on the CPU and on an accelerator that is only pretended.

Random models of a few thousand weights, every command by its own entry point. On `pretend:0` tensors of two
devices cannot meet and nothing leaves torch without a transfer; what comes out is held to the CPU's in float32.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import pretend

import blip2
from blip2.cli.main import main
from blip2.data.shards.writer import write_shard
from blip2.data.sources import open_collection
from blip2.inference import Blip2
from blip2.weights import runs

HF = Callable[[str], tuple[Path, Any]]
COLORS = ("red", "green", "blue", "black", "white", "yellow", "gray", "orange")
SHORT = {"min_tokens": 2, "max_tokens": 6}
TEXTS = ["two cats sleep on a red sofa", "a photo of a dog on the grass"]


@dataclass(frozen=True)
class Place:
    """Where everything runs, and in which precision `auto` does."""

    device: str
    precision: str

    @property
    def near(self) -> dict[str, float]:
        """How far its numbers may be from the CPU's in float32: a rounding, or bf16's 8 bits through a few layers."""
        return {"rtol": 1e-4, "atol": 1e-5} if self.precision == "fp32" else {"rtol": 0.15, "atol": 0.06}


PLACES = [Place(device, precision) for device in ("cpu", f"{pretend.NAME}:0", "cuda") for precision in ("fp32", "bf16")]


def marked(place: Place) -> Any:
    name = f"{place.device.split(':')[0]}-{place.precision}"
    return pytest.param(place, id=name, marks=[pytest.mark.gpu] if place.device == "cuda" else [])


@pytest.fixture(scope="module", params=map(marked, PLACES))
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_PRECISION", request.param.precision)
        if request.param.device != f"{pretend.NAME}:0":
            yield request.param
            return
        if pretend.UNAVAILABLE:
            pytest.skip(pretend.UNAVAILABLE)
        with pretend.pretend():
            yield request.param


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures with captions, and a question with its answer, as a JSONL data set."""
    folder, rng, lines = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for number, color in enumerate(COLORS):
        picture = Image.new("RGB", (60, 50), color)
        picture.paste(Image.fromarray(rng.integers(0, 255, (25, 30, 3), dtype=np.uint8)), (number * 3, 10))
        picture.save(folder / f"{number}.png")
        asked = [{"question": "what is it", "answers": ["a bird" if number % 2 else "a dog"]}]
        captions = [TEXTS[number % 2], "a dog" if number % 3 else "a bird on a sofa"]
        lines.append({"image": f"{number}.png", "captions": captions, "qa": asked})
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "set.jsonl"


def command(recipe: str, hf: HF, data: Path, out: Path, place: Place, *more: str) -> list[str]:
    itm, opt = str(hf("itm")[0]), str(hf("opt")[0])
    towers = ["--vision.name", itm, "--vision.image_size", "56", "--vision.pool", "1", "--qformer.init", itm]
    towers += ["--qformer.queries", "5", "--qformer.embed_dim", "16", "--language.name", opt]
    read = ["--data", str(data), "--data.dev", str(data), "--data.workers", "0", "--train.device", place.device]
    loop = ["--steps", "4", "--batch", "4", "--optim.warmup", "0", "--optim.lr", "1e-3"]
    loop += ["--train.eval_every", "2", "--train.save_every", "2"]
    loop += ["--eval.images", "6", "--eval.samples", "2", "--eval.min_tokens", "2", "--eval.max_tokens", "6"]
    return ["train", f"tiny/{recipe}", "--out", str(out), *towers, *read, *loop, *more]


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    read = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in read if line["kind"] == kind]


def train_both(hf: HF, data: Path, folder: Path, place: Place) -> dict[str, Path]:
    """Stage 1 from random weights, in micro-batches; stage 2 from it, on cached features."""
    first = blip2.convert(hf("itm")[0], folder / "itm", "blip2").target
    made = {"stage1": folder / "s1", "stage2": folder / "s2"}
    more = ("--init", str(first), "--train.accumulate", "2", "--data.cache_features", "false")
    assert main(command("stage1", hf, data, made["stage1"], place, *more)) == 0
    more = ("--init", str(made["stage1"]), "--data.cache_features", "true", "--data.texts_per_image", "2")
    assert main(command("stage2", hf, data, made["stage2"], place, *more)) == 0
    return made


@pytest.fixture(scope="module")
def reference(hf: HF, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both stages on the CPU in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_PRECISION", "fp32")
        return train_both(hf, data, tmp_path_factory.mktemp("reference"), Place("cpu", "fp32"))


@pytest.fixture(scope="module")
def trained(
    reference: dict[str, Path], place: Place, hf: HF, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Both stages at this place."""
    return train_both(hf, data, tmp_path_factory.mktemp("runs"), place)


@pytest.fixture(scope="module")
def models(reference: dict[str, Path], place: Place) -> tuple[Blip2, Blip2]:
    """The reference's stage 2, with its stage 1 behind it: at this place, and on the CPU in float32."""
    return blip2.load(reference["stage2"], device=place.device), blip2.load(
        reference["stage2"], device="cpu", dtype="fp32"
    )


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_stage_trains_as_on_the_cpu(
    stage: str, trained: dict[str, Path], reference: dict[str, Path], place: Place
) -> None:
    for kind, names in (("train", ("loss", "grad_norm")), ("dev", ("loss",))):
        found, wanted = lines(trained[stage], kind), lines(reference[stage], kind)
        assert [line["step"] for line in found] == [line["step"] for line in wanted]
        for name in names:
            want = np.array([line[name] for line in wanted])
            np.testing.assert_allclose([line[name] for line in found], want, **place.near, err_msg=name)
    dev = lines(trained[stage], "dev")
    assert len(dev) == 3
    assert all(("t2i_r1" in line) == (stage == "stage1") for line in dev)
    shown = json.loads((trained[stage] / "samples/step-000004.json").read_text())
    assert [isinstance(entry["caption"], str) for entry in shown] == [True, True]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_resumed_run_repeats_it(stage: str, trained: dict[str, Path], place: Place, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[stage], run)
    shutil.rmtree(runs.checkpoints(run)[-1][1])
    assert main(["train", str(run)]) == 0
    again, once = ([line["loss"] for line in lines(folder, "train")] for folder in (run, trained[stage]))
    assert again == once


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_backward_passes_at_the_end_give_the_same(
    stage: str, trained: dict[str, Path], hf: HF, data: Path, place: Place, tmp_path: Path
) -> None:
    """The default runs them early; in bf16 the two round at other places."""
    init = trained["stage1"] if stage == "stage2" else tmp_path / "itm"
    if stage == "stage1":
        blip2.convert(hf("itm")[0], init, "blip2")
    cached = ("--data.cache_features", "true", "--data.texts_per_image", "2")
    same = cached if stage == "stage2" else ("--data.cache_features", "false", "--train.accumulate", "2")
    more = ("--init", str(init), "--train.early_backward", "false", *same)
    assert main(command(stage, hf, data, tmp_path / "run", place, *more)) == 0
    late, early = ([line["loss"] for line in lines(folder, "train")] for folder in (tmp_path / "run", trained[stage]))
    np.testing.assert_allclose(late[0], early[0], rtol=1e-4 if place.precision == "fp32" else 0.05)


@pytest.mark.parametrize(
    ("recipe", "stage", "best", "more"),
    [
        ("caption", "stage2", "cider", ("--vision.train", "true")),
        ("retrieval", "stage1", "recall", ("--data.cache_features", "false")),
        ("vqa", "stage2", "accuracy", ("--data.cache_features", "false", "--vision.train", "false")),
        ("search", "stage1", None, ("--data.cache_features", "false")),
        ("answers", "stage2", None, ("--data.cache_features", "false")),
        ("instruct", "stage2", None, ("--data.cache_features", "true", "--lora.qformer_rank", "2")),
    ],
)
def test_recipes(
    recipe: str,
    stage: str,
    best: str | None,
    more: tuple[str, ...],
    trained: dict[str, Path],
    hf: HF,
    data: Path,
    place: Place,
    tmp_path: Path,
) -> None:
    more = ("--init", str(trained[stage]), *more)
    assert main(command(recipe, hf, data, tmp_path / "run", place, *more)) == 0
    dev = lines(tmp_path / "run", "dev")
    assert len(dev) == 3
    if best:
        score = json.loads((tmp_path / "run/best/score.json").read_text())
        assert score["score"] == max(line[best] for line in dev)
    assert isinstance(blip2.load(tmp_path / "run", device=place.device), Blip2)


def test_several_images_and_films(
    trained: dict[str, Path], hf: HF, data: Path, place: Place, tmp_path: Path, capsys: Any
) -> None:
    """Trained on samples of one, two and four images, asked as typed, and its soft prompts held to the CPU's."""
    pictures = [str(data.parent / f"{n}.png") for n in range(8)]
    frames = [Image.open(name) for name in pictures]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    asked = {"captions": [TEXTS[0]], "qa": [{"question": "what is it", "answers": ["a bird"]}]}
    sources: list[dict[str, Any]] = [{"image": pictures[0]}, {"images": pictures[1:3]}, {"video": "film.gif"}]
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps({**s, **asked}) for s in [*sources, sources[1]]))
    more = ["--init", str(trained["stage2"]), "--data.cache_features", "false", "--qformer.image_places", "6"]
    more += ["--language.image_mark", "{}:", "--eval.best", "null"]
    run = tmp_path / "run"
    assert main(command("instruct", hf, tmp_path / "set.jsonl", run, place, *more)) == 0
    assert len(lines(run, "dev")) == 3
    model, reference = blip2.load(run, device=place.device), blip2.load(run, device="cpu", dtype="fp32")
    film = str(tmp_path / "film.gif")
    for sample in (pictures[:3], film):
        [(_, features)], [(_, wanted)] = model.sample_batches([sample]), reference.sample_batches([sample])
        soft, want = model.soft_prompts(features, ["what is it"]), reference.soft_prompts(wanted, ["what is it"])
        scale = float(want.abs().max())
        np.testing.assert_allclose(np.array(soft.tolist()) / scale, np.array(want.tolist()) / scale, **place.near)
    answer = model.answer([*pictures[:2], film], "what is it", **SHORT)
    capsys.readouterr()
    typed = ["ask", *pictures[:2], film, "what is it", "--model", str(run), "--device", place.device]
    assert main(typed) == 0
    assert capsys.readouterr().out.strip() == model.answer([*pictures[:2], film], "what is it")
    assert isinstance(answer, str)


def test_embeddings_and_matches(models: tuple[Blip2, Blip2], data: Path, place: Place) -> None:
    here, there = models
    pictures = sorted(data.parent.glob("*.png"))
    assert str(here.features(pictures[:1]).device).startswith(place.device)
    for found, wanted in (
        (here.embed_images(pictures), there.embed_images(pictures)),
        (here.embed_texts(TEXTS), there.embed_texts(TEXTS)),
        (here.similarity(pictures, TEXTS), there.similarity(pictures, TEXTS)),
        (here.match(pictures, TEXTS[0]), there.match(pictures, TEXTS[0])),
    ):
        assert (found.device.type, found.dtype) == ("cpu", torch.float32)
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), **place.near)


DECODINGS = {"beams": {}, "greedy": {"beams": 1}, "several": {"num": 2, "beams": 3}, "best of": {"rerank": 3}}


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_captions(decoding: dict[str, int], models: tuple[Blip2, Blip2], data: Path, place: Place) -> None:
    here, there = models
    pictures = sorted(data.parent.glob("*.png"))[:3]
    found = here.caption(pictures, **SHORT, **decoding)
    wanted = there.caption(pictures, **SHORT, **decoding)
    assert np.shape(found) == np.shape(wanted)
    assert found == wanted or place.precision == "bf16"


def test_sampled_captions_and_those_of_stage_1(
    models: tuple[Blip2, Blip2], reference: dict[str, Path], data: Path, place: Place
) -> None:
    pictures = sorted(data.parent.glob("*.png"))[:2]
    sampled = models[0].caption(pictures, beams=1, sample=True, num=2, **SHORT)
    assert np.shape(sampled) == (2, 2)
    first = blip2.load(reference["stage1"], device=place.device)
    wanted = blip2.load(reference["stage1"], device="cpu", dtype="fp32").caption(pictures, **SHORT)
    assert first.caption(pictures, **SHORT) == wanted or place.precision == "bf16"


def test_answers(models: tuple[Blip2, Blip2], data: Path, place: Place) -> None:
    here, there = models
    pictures, questions = sorted(data.parent.glob("*.png"))[:2], ["what is it", "what is a dog"]
    shots = [{"image": pictures[0], "question": questions[0], "answer": "a bird"}]
    for ask in (
        lambda model: model.ask(pictures, questions),
        lambda model: model.ask_many(pictures, questions),
        lambda model: model.rank_answers(pictures, questions, ["a bird", "a dog", "two cats"]),
        lambda model: model.ask(pictures[1:], questions[:1], shots=shots),
    ):
        found, wanted = ask(here), ask(there)
        assert np.shape(found) == np.shape(wanted)
        assert found == wanted or place.precision == "bf16"


def test_an_encoder_decoder(trained: dict[str, Path], hf: HF, data: Path, place: Place, tmp_path: Path) -> None:
    more = ("--init", str(trained["stage1"]), "--language.name", str(hf("t5")[0]), "--data.cache_features", "false")
    assert main(command("stage2", hf, data, tmp_path / "run", place, *more)) == 0
    model = blip2.load(tmp_path / "run", device=place.device)
    pictures = sorted(data.parent.glob("*.png"))[:2]
    assert np.shape(model.caption(pictures, num=2, beams=2, **SHORT)) == (2, 2)
    assert np.shape(model.ask_many(pictures, ["what is it", "a dog"])) == (2, 2)
    assert model.attend(pictures[0]).word_maps.ndim == 2


def test_examples_in_front(trained: dict[str, Path], hf: HF, data: Path, place: Place, tmp_path: Path) -> None:
    more = ("--init", str(trained["stage1"]), "--data.cache_features", "false", "--data.shots", "1")
    assert main(command("stage2", hf, data, tmp_path / "run", place, *more)) == 0
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run", "train"))


def test_attention(models: tuple[Blip2, Blip2], data: Path, place: Place, tmp_path: Path) -> None:
    picture = data.parent / "1.png"
    found, wanted = (model.attend(picture, TEXTS[0]) for model in models)
    for name in ("queries", "itc", "itc_maps", "itm_maps", "pair_queries"):
        ours = getattr(found, name)
        assert (ours.device.type, ours.dtype) == ("cpu", torch.float32)
        if name in ("queries", "itc"):
            np.testing.assert_allclose(ours.numpy(), getattr(wanted, name).numpy(), **place.near, err_msg=name)
    assert len(found.words) == len(found.word_maps)
    page = tmp_path / "page.html"
    assert models[0].show(picture, ["what is it"], text=TEXTS[0], maps=True).cards
    source = runs_of(models)
    given = ["--model", source, "--device", place.device, "--out", str(page)]
    assert main(["explain", str(picture), TEXTS[0], *given]) == 0
    assert "data:image/png;base64," in page.read_text()
    assert main(["explain", "--data", str(data), *given]) == 0


def runs_of(models: tuple[Blip2, Blip2]) -> str:
    return str(models[1].home)


def test_evaluation(
    models: tuple[Blip2, Blip2], reference: dict[str, Path], data: Path, place: Place, tmp_path: Path, capsys: Any
) -> None:
    def run(task: str, where: Place, *more: str) -> dict[str, Any]:
        assert main(["evaluate", task, "--data", str(data), "--json", *more, "--device", where.device]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    short = ("--model", str(reference["stage2"]), "--beams", "2", "--min-tokens", "1", "--max-tokens", "5")
    for task, more in (
        ("caption", short),
        ("vqa", short),
        ("vqa", (*short, "--candidates", str(candidates(tmp_path)))),
        ("retrieval", ("--model", str(reference["stage1"]), "-k", "4")),
    ):
        name = task + ("-ranked" if "--candidates" in more else "")
        found = run(task, place, *more, "--out", str(tmp_path / f"{name}-here"))
        wanted = run(task, Place("cpu", "fp32"), *more, "--dtype", "fp32", "--out", str(tmp_path / f"{name}-cpu"))
        assert found["n"] == wanted["n"] == 8
        assert found["metrics"] == wanted["metrics"] or place.precision == "bf16"


def candidates(folder: Path) -> Path:
    path = folder / "candidates.txt"
    path.write_text("a bird\na dog\ntwo cats\n")
    return path


def test_search(reference: dict[str, Path], data: Path, place: Place, tmp_path: Path, capsys: Any) -> None:
    at = ("--model", str(reference["stage1"]), "--device", place.device)
    index, folder = str(tmp_path / "i.index"), str(data.parent)
    assert main(["index", "build", folder, "--out", index, *at]) == 0
    capsys.readouterr()
    model = blip2.load(reference["stage1"], device="cpu", dtype="fp32")
    pictures = sorted(data.parent.glob("*.png"))
    order = model.similarity(pictures, TEXTS[0])[:, 0].argsort(descending=True)
    assert main(["search", index, TEXTS[0], "--rerank", "0", "--k", "8", "--json", *at]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(hit["path"] for hit in hits) == [str(path) for path in pictures]
    if place.precision == "fp32":
        assert [hit["path"] for hit in hits] == [str(pictures[n]) for n in order]
    assert main(["search", index, TEXTS[0], "--rerank", "4", "--k", "4", "--json", *at]) == 0
    assert main(["search", index, "--image", str(pictures[0]), "--k", "1", "--rerank", "0", "--json", *at]) == 0
    assert str(pictures[0]) in capsys.readouterr().out
    assert main(["index", "stat", index, "--check"]) == 0


def test_capfilt(hf: HF, reference: dict[str, Path], data: Path, place: Place, tmp_path: Path, capsys: Any) -> None:
    rows = []
    for path in sorted(data.parent.glob("*.png"))[:3]:
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "PNG")
        rows.append((path.stem, buffer.getvalue(), {"image_id": path.stem, "captions": [TEXTS[0]]}))
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in/s-00000.tar", rows)
    sizes = ["--samples", "2", "--min-tokens", "2", "--max-tokens", "6", "--batch", "2", "--threads", "1", "--json"]
    for name, captioner, ranker in (
        ("ours", str(reference["stage2"]), str(reference["stage1"])),
        ("theirs", str(hf("blip")[0]), str(hf("clip")[0])),
    ):
        models = ["--captioner", captioner, "--ranker", ranker, "--device", place.device]
        assert main(["capfilt", str(tmp_path / "in"), str(tmp_path / name), *models, *sizes]) == 0, name
        made = open_collection(str(tmp_path / name))
        assert len(made.samples) == 3
        assert all(sample.captions for sample in made.samples)


def test_caption_and_ask_as_typed(reference: dict[str, Path], data: Path, place: Place, capsys: Any) -> None:
    at = ["--model", str(reference["stage2"]), "--device", place.device]
    assert main(["caption", str(data.parent / "0.png"), "--min-tokens", "2", "--max-tokens", "6", "--json", *at]) == 0
    assert json.loads(capsys.readouterr().out)["captions"]
    assert main(["ask", str(data.parent / "0.png"), "what is it", "--json", *at]) == 0
    assert "answer" in json.loads(capsys.readouterr().out)


def test_the_server(reference: dict[str, Path], models: tuple[Blip2, Blip2], data: Path, place: Place) -> None:
    """The model works in a thread of its own there."""
    pytest.importorskip("fastapi", reason="blip2 serve needs the extra `serve`")
    from fastapi.testclient import TestClient

    from blip2.server.app import create_app
    from blip2.server.settings import Settings

    here, there = models
    picture = data.parent / "1.png"
    image = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    with TestClient(create_app([("tiny", here, None)], Settings()), base_url="http://127.0.0.1:8000") as client:

        def post(path: str, **body: Any) -> Any:
            answer = client.post(path, json={"image": image, **body})
            assert answer.status_code == 200, answer.text
            return answer.json()

        exact = place.precision == "fp32"
        assert post("/caption")["captions"][0]["text"] == there.caption(picture)[0] or not exact
        assert post("/ask", question="what is it")["answer"] == there.ask([picture], "what is it")[0] or not exact
        itc = post("/attend", text=TEXTS[0])["itc"]
        np.testing.assert_allclose(max(itc), float(there.similarity([picture], TEXTS[0])), **place.near)
        for kind in ("float", "base64"):
            body = {"model": "tiny", "input": TEXTS, "encoding_format": kind}
            assert len(client.post("/v1/embeddings", json=body).json()["data"]) == 2
        part = {"type": "image_url", "image_url": {"url": image}}
        turn = {"role": "user", "content": [part, {"type": "text", "text": "what is it"}]}
        body = {"model": "tiny", "messages": [turn], "temperature": 0.7, "seed": 1}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
