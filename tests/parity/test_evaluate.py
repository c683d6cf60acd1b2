"""`blip2 evaluate` on tiny random checkpoints: numbers against plain references, resume, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blip2
from blip2.cli.main import main
from blip2.configs import DecodingConfig
from blip2.data.sources import open_collection
from blip2.errors import ConfigError
from blip2.evaluation import retrieval
from blip2.evaluation.published import published
from blip2.evaluation.vqa import lemmatised
from blip2.metrics.captioning import bleu, cider
from blip2.metrics.retrieval import candidate_pairs, fill_with_similarity, recall_at_k, reranked_scores

HF = Callable[[str], tuple[Path, Any]]
SHORT = ["--beams", "2", "--min-tokens", "1", "--max-tokens", "5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with captions and questions, as JSONL."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for n in range(6):
        Image.fromarray(rng.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        captions = ["a dog on the grass", "two cats sleep"] if n % 2 else ["a red sofa on the grass"]
        asked = [
            {"question": "what is it?", "answers": ["dog"] * 9 + ["cat"]},
            {"question": "how many?", "answers": ["2"]},
        ]
        lines.append(json.dumps({"key": f"k{n}", "image": f"{n}.png", "captions": captions, "qa": asked[: 1 + n % 2]}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return folder / "set.jsonl"


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_captioning(hf: HF, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(hf("opt")[0]), tmp_path / "e"
    command = [
        "evaluate",
        "caption",
        "--model",
        source,
        "--data",
        str(data),
        "--out",
        str(out),
        "--dtype",
        "fp32",
        *SHORT,
    ]
    assert main([*command, "--json"]) == 0
    result = last(capsys)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"k{n}" for n in range(6)]
    captions, references = [line["caption"] for line in lines], [line["references"] for line in lines]
    assert result["metrics"]["bleu1"] == pytest.approx(bleu(captions, references)["bleu1"], abs=0.01)
    assert result["metrics"]["cider"] == pytest.approx(cider(captions, references), abs=0.01)
    assert (result["task"], result["n"], result["settings"]["beams"]) == ("caption", 6, 2)
    for name in ("meteor", "spice"):
        assert result["metrics"][name] is not None or result["missing"][name]
    model = blip2.load(source, dtype="fp32")
    images = [data.parent / f"{n}.png" for n in range(6)]
    assert captions == model.caption(images, beams=2, min_tokens=1, max_tokens=5)
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    # a folder of other settings is refused, the same is complete at once
    assert main([*command, "--repetition-penalty", "2"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    (out / "predictions.jsonl").write_text("\n".join(json.dumps(line) for line in lines[:3]) + '\n{"id": "k3", "cap')
    assert main([*command, "--json"]) == 0
    assert last(capsys)["metrics"] == result["metrics"]


def test_questions(hf: HF, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["evaluate", "vqa", "--model", str(hf("t5")[0]), "--data", str(data), "--dtype", "fp32", "--json", *SHORT]
    assert main([*base, "--out", str(tmp_path / "free")]) == 0
    free = last(capsys)
    assert free["n"] == 9
    assert free["metrics"]["per_type"].keys() == {"other", "number"}
    assert free["metrics"]["majority"] == pytest.approx(100 * 6 * 1.0 / 9, abs=0.01)
    (tmp_path / "answers.txt").write_text("dog\n2\n")
    ranked = [*base, "--out", str(tmp_path / "ranked"), "--candidates", str(tmp_path / "answers.txt")]
    assert main(ranked) == 0
    assert last(capsys)["n"] == 9
    lines = [json.loads(line) for line in (tmp_path / "ranked" / "predictions.jsonl").read_text().splitlines()]
    assert {line["answer"] for line in lines} <= {"dog", "2"}
    assert main([*base, "--out", str(tmp_path / "shuffled"), "--shuffle", "--limit", "4"]) == 0
    assert last(capsys)["settings"]["shuffled"] is True


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_ranking_follows_the_likelihood(hf: HF, data: Path, kind: str) -> None:
    model = blip2.load(hf(kind)[0], dtype="fp32")
    assert model.stage2 is not None
    image, candidates = data.parent / "1.png", ["a dog", "two cats sleep", "it"]
    prompt = model.config.language.question.format("what is it?")
    soft = model.stage2.soft_prompts(model.features(image))
    scores = []
    for text in candidates:
        tokenizer, language = model.language_tokenizer, model.stage2.language_model
        if kind == "t5":
            parts = tokenizer.pairs([prompt], [text])
            mean = language.encoder_decoder_loss(soft, *parts)
            scores.append(-float(mean) * int(parts[3].sum()))
        else:
            parts3 = tokenizer.targets([prompt], [text])
            scores.append(-float(language.decoder_loss(soft, *parts3)) * int(parts3[2].sum()))
    assert model.rank_answers(image, "what is it?", candidates) == [candidates[int(np.argmax(scores))]]


@pytest.mark.parametrize("room", [retrieval.KEPT_FEATURES, 0])
def test_retrieval(
    hf: HF, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "KEPT_FEATURES", room)
    source = str(hf("itm")[0])
    command = ["evaluate", "retrieval", "--model", source, "--data", str(data), "--dtype", "fp32", "--json", "-k", "3"]
    assert main([*command, "--out", str(tmp_path / "e")]) == 0
    result = last(capsys)
    model = blip2.load(source, dtype="fp32")
    entries = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [text for entry in entries for text in entry["captions"]]
    owners = np.array([n for n, entry in enumerate(entries) for _ in entry["captions"]])
    images = [data.parent / entry["image"] for entry in entries]
    similarity = model.similarity(images, texts).numpy()
    lines = [json.loads(line) for line in (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()]
    # the plain procedure: every pair by itself
    match = np.full_like(similarity, -np.inf)
    for i, (image, line) in enumerate(zip(images, lines, strict=True)):
        kv = model.image_kv(model.features(image))
        for t, logit in zip(line["texts"], line["itm"], strict=True):
            assert logit == pytest.approx(float(model.match_logits(kv, [texts[t]])[0, 1]), rel=1e-4, abs=1e-5)
            match[i, t] = logit  # random weights score alike: rounding must not decide a rank here
    # what is not matched stands below all that is, as ITC has it
    by_image, by_text = similarity - 100, similarity - 100
    for i in range(len(images)):
        best = np.argsort(-similarity[i])[:3]
        by_image[i, best] = similarity[i, best] + match[i, best]
    for t in range(len(texts)):
        best = np.argsort(-similarity[:, t])[:3]
        by_text[best, t] = similarity[best, t] + match[best, t]
    first, second = recall_at_k(by_image, owners), recall_at_k(by_text, owners)
    expected = {name: (first if name.startswith("i2t") else second)[name] for name in first}
    assert result["metrics"]["reranked"] == pytest.approx(expected, abs=0.01)
    assert result["metrics"]["itc"] == pytest.approx(recall_at_k(similarity, owners), abs=0.01)
    # another weight counts the same matches again
    assert main([*command, "--out", str(tmp_path / "e"), "--itc-weight", "1e6"]) == 0
    again = last(capsys)
    assert again["settings"]["itc_weight"] == 1e6
    assert again["metrics"]["reranked"]["t2i_r1"] == pytest.approx(again["metrics"]["itc"]["t2i_r1"])
    after = [json.loads(line) for line in (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()]
    assert [line["itm"] for line in after] == [line["itm"] for line in lines]
    assert main([*command, "--out", str(tmp_path / "e"), "-k", "2"]) == 2


def test_classes(hf: HF, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, labels = str(hf("itm")[0]), ["dog", "cat", "red sofa", "dog", "grass", "cat"]
    path = data.parent / "labels.jsonl"
    path.write_text("\n".join(json.dumps({"image": f"{n}.png", "label": label}) for n, label in enumerate(labels)))
    command = ["evaluate", "classify", "--model", source, "--data", str(path), "--dtype", "fp32", "--json"]
    templates = ["--template", "a {}", "--template", "two {}"]
    assert main([*command, *templates, "--out", str(tmp_path / "e")]) == 0
    result = last(capsys)
    lines = [json.loads(line) for line in (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()]
    # the plain procedure
    model, classes = blip2.load(source, dtype="fp32"), ["dog", "cat", "red sofa", "grass"]
    texts = [(model.embed_texts([f"a {name}", f"two {name}"])).mean(dim=0) for name in classes]
    named = []
    for n, label in enumerate(labels):
        queries = model.embed_images(data.parent / f"{n}.png")[0]
        scores = [float((queries @ (text / text.norm())).max()) for text in texts]
        order = np.argsort(-np.array(scores), kind="stable")
        named.append(classes[int(order[0])])
        assert lines[n]["best"] == [classes[k] for k in order]
        assert lines[n]["rank"] == 1 + [classes[k] for k in order].index(label)
        assert lines[n]["similarity"] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
    assert result["metrics"]["top1"] == pytest.approx(
        100 * np.mean([a == b for a, b in zip(named, labels, strict=True)]), abs=0.01
    )
    assert result["metrics"]["top5"] == 100
    (tmp_path / "classes.txt").write_text("\n".join([*classes, "horse"]))
    assert main([*command, "--out", str(tmp_path / "f"), "--classes", str(tmp_path / "classes.txt")]) == 0
    assert last(capsys)["settings"]["classes"] == 5
    (tmp_path / "classes.txt").write_text("dog\nhorse\n")
    for options, message in (
        (["--classes", str(tmp_path / "classes.txt")], "classes.txt: 'cat' of "),
        (["--template", "a photo"], "--template 'a photo': it needs one {}"),
    ):
        assert main([*command, "--out", str(tmp_path / "g"), *options]) == 2
        assert message in capsys.readouterr().err


def test_pairs_are_joined_and_each_direction_keeps_its_own() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.7]])
    pairs = candidate_pairs(similarity, 1)
    assert [p.tolist() for p in pairs] == [[0], [1, 2]]
    matches = [(pairs[0], np.array([1.0])), (pairs[1], np.array([2.0, 3.0]))]
    by_image, by_text = reranked_scores(similarity, matches, 1)
    assert np.isneginf(by_image).tolist() == [[False, True, True], [True, False, True]]
    assert np.isneginf(by_text).tolist() == [[False, True, True], [True, False, False]]
    assert by_text[1, 2] == pytest.approx(3.7)
    assert reranked_scores(similarity, matches, 1, itc_weight=10.0)[1][1, 2] == pytest.approx(10.0)


def test_what_is_not_matched_stands_behind_as_itc_ranks_it() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.7]])
    scores = np.array([[-8.1, -np.inf, -np.inf], [-np.inf, -4.2, -np.inf]])
    # the lowest score is -8.1: the rest stands at similarity - (0.9 + 1 + 8.1)
    assert fill_with_similarity(scores, similarity) == pytest.approx(np.array([[-8.1, -9.9, -9.8], [-9.7, -4.2, -9.3]]))
    assert fill_with_similarity(np.full((2, 3), -np.inf), similarity).argmax(1).tolist() == [0, 1]


@pytest.mark.slow
def test_two_processes_give_the_same(hf: HF, data: Path, tmp_path: Path) -> None:
    command = ["-m", "blip2", "evaluate", "caption", "--model", str(hf("opt")[0]), "--data", str(data), *SHORT]
    command += ["--batch", "2", "--dtype", "fp32", "--json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    results = []
    for name, before in (("one", []), ("two", launcher)):
        arguments = [sys.executable, *before, *command, "--out", str(tmp_path / name)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(done.stdout.splitlines()[-1])["metrics"])
        assert sorted(p.name for p in (tmp_path / name).glob("predictions*")) == ["predictions.jsonl"]
    assert results[0] == results[1]
    assert (tmp_path / "one/predictions.jsonl").read_text() == (tmp_path / "two/predictions.jsonl").read_text()


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("caption", [{"image": "0.png", "question": "q", "answers": ["a"]}], "has no caption to compare with"),
        ("vqa", [{"image": "0.png", "captions": ["a"]}], "no questions in it"),
        ("vqa", [{"image": "0.png", "captions": ["a"], "question": "q"}], "has a question without answers: 'q'"),
        ("retrieval", [{"image": "0.png", "captions": ["a"]}], "retrieval needs two or more"),
        ("caption", [], "nothing in it"),
        ("classify", [{"image": "0.png", "captions": ["a"]}], "has no label"),
        ("classify", [{"image": "0.png", "label": "a"}], "all images are 'a'"),
    ],
)
def test_refused_before_a_model_is_loaded(
    task: str, lines: list[dict[str, Any]], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data.parent / "other.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert main(["evaluate", task, "--model", "no/model/here", "--data", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("blip2: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("caption", ["--limit", "0"], "--limit is 0: it must be 1 or more"),
        ("caption", ["--beams", "0"], "beams is 0: it must be 1 or more"),
        ("vqa", ["--questions", "0"], "--questions is 0: it must be 1 or more"),
        ("vqa", ["--candidates", "nowhere.txt"], "nowhere.txt: cannot be read"),
        ("retrieval", ["-k", "0"], "-k is 0: it must be 1 or more"),
        ("retrieval", ["--itc-weight", "much"], "--itc-weight is 'much': it must be a number or auto"),
    ],
)
def test_options_refused_before_a_model_is_loaded(
    task: str, options: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data.parent / "asked.jsonl"
    line = {"captions": ["a"], "question": "q", "answers": ["a"]}
    path.write_text("\n".join(json.dumps({"image": name, **line}) for name in ("0.png", "1.png")))
    assert main(["evaluate", task, "--model", "no/model/here", "--data", str(path), *options]) == 2
    assert message in capsys.readouterr().err


def test_samples_are_left_out_only_when_asked(
    hf: HF, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data.parent / "part.jsonl"
    path.write_text("\n".join(json.dumps({"image": n, "captions": c}) for n, c in (("0.png", ["a"]), ("1.png", []))))
    command = ["evaluate", "caption", "--model", str(hf("opt")[0]), "--data", str(path), *SHORT, "--dtype", "fp32"]
    assert main([*command, "--out", str(tmp_path / "e")]) == 2
    assert "1 of 2 samples cannot be used, the first: 2-1: " in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    assert main([*command, "--out", str(tmp_path / "e"), "--skip-bad", "--json"]) == 0
    result = last(capsys)
    assert (result["n"], result["settings"]["left_out"]) == (1, 1)


@pytest.mark.parametrize("task", ["caption", "vqa", "retrieval"])
def test_an_image_that_breaks_at_decoding_is_named_or_left_out(
    task: str, hf: HF, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = data.parent / "cut.png"
    cut.write_bytes((data.parent / "0.png").read_bytes()[:-40])
    path = data.parent / "cut.jsonl"
    line = {"captions": ["a"], "question": "q", "answers": ["a"]}
    path.write_text("\n".join(json.dumps({"image": n, **line}) for n in ("0.png", "cut.png", "1.png")))
    model = str(hf("itm" if task == "retrieval" else "opt")[0])
    short = ["-k", "2"] if task == "retrieval" else SHORT
    command = ["evaluate", task, "--model", model, "--data", str(path), *short, "--dtype", "fp32"]
    assert main([*command, "--out", str(tmp_path / "e")]) == 2
    told = capsys.readouterr().err
    assert "1 of 3 samples cannot be used, the first: 2-cut: image is truncated" in told
    assert str(cut) in told
    assert main([*command, "--out", str(tmp_path / "e"), "--skip-bad", "--json"]) == 0
    result = last(capsys)
    assert (result["n"], result["settings"]["left_out"], result["settings"]["images"]) == (2, 1, 2)


def test_the_papers_values() -> None:
    assert published("vqa", "Salesforce/blip2-flan-t5-xl", "gqa/testdev.tar") == {"accuracy": 44.2}
    assert published("caption", "blip2-opt-2.7b-coco", "coco:test")["cider"] == 145.8
    assert published("caption", "runs/s2", "flickr8k:dev") == {}


def test_prompts_side_by_side(hf: HF, data: Path, tmp_path: Path, capsys: Any) -> None:
    first, second = str(hf("opt")[0]), str(hf("t5")[0])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of\n\nQuestion: what is it? Answer:\n")
    command = ["evaluate", "prompts", "--prompts", str(prompts), "--models", first, second, "--data", str(data)]
    command += ["--limit", "2", "--max-tokens", "4", "--beams", "2", "--dtype", "fp32", "--out", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert result["answers"] == lines
    assert [line["prompt"] for line in lines] == ["a photo of", "Question: what is it? Answer:"] * 2
    samples = open_collection(str(data)).samples
    decoding = DecodingConfig(beams=2, min_tokens=1, max_tokens=4)
    for name in (first, second):
        model = blip2.load(name, dtype="fp32")
        features = model.features([samples[0].read(), samples[0].read()])
        want = model.generate(features, [line["prompt"] for line in lines[:2]], decoding)
        assert [line["answers"][name] for line in lines[:2]] == [texts[0] for texts in want]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2
    prompts.write_text("\n")
    assert main(command) == 2
    assert f"{prompts}: no prompts in it" in capsys.readouterr().err


def test_domains_are_counted_apart(hf: HF, data: Path, tmp_path: Path, capsys: Any) -> None:
    samples = open_collection(str(data)).samples
    lines = []
    for number, sample in enumerate(samples):
        (tmp_path / f"{number}.png").write_bytes(sample.read())
        domain = "in" if number % 2 else "out"
        lines.append({"image": f"{number}.png", "captions": list(sample.captions), "domain": domain})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["evaluate", "caption", "--model", str(hf("opt")[0]), "--data", str(tmp_path / "set.jsonl"), *SHORT]
    assert main([*command, "--dtype", "fp32", "--out", str(tmp_path / "out"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    entries = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert list(metrics["per_domain"]) == ["in", "out"]
    if not metrics["meteor"]:  # our own scorers
        inside = [e for n, e in enumerate(entries) if n % 2]
        want = cider([e["caption"] for e in inside], [e["references"] for e in inside])
        assert metrics["per_domain"]["in"]["cider"] == pytest.approx(want, abs=0.01)


def test_lemmas_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplemma")
    assert lemmatised(["dogs running", "a horse", "women"]) == ["dog run", "a horse", "woman"]
    monkeypatch.setitem(sys.modules, "simplemma", None)
    with pytest.raises(ConfigError, match="lemmas need simplemma"):
        lemmatised(["dogs"])
