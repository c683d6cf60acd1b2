"""`blip2 index` and `blip2 search` on a tiny random model, against plain references."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.cli.main import main
from blip2.errors import ConfigError
from blip2.inference import Blip2
from blip2.search import build as build_module
from blip2.search.build import Builder, list_samples
from blip2.search.model_id import identify
from blip2.search.query import Index
from blip2.search.store import ModelId, Store

TEXT = "a dog on the grass"


@pytest.fixture(scope="module")
def model(tiny: Path) -> Blip2:
    return blip2.load(tiny, dtype="fp32")


@pytest.fixture
def index(model: Blip2, photos: Path, tmp_path: Path) -> Index:
    """The twelve photographs with their captions."""
    store = Store.create(tmp_path / "i", identify(model, "tiny"), "exact", "data")
    Builder(store, model, progress=False).add(list_samples([str(photos)]).samples)
    return Index(store, model)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def files(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.png"))


def test_text_search_ranks_by_itc(index: Index, model: Blip2, photos: Path) -> None:
    hits = index.search(TEXT, k=12, rerank=0)
    similarity = model.similarity(files(photos), TEXT)[:, 0]
    expected = [str(files(photos)[n]) for n in similarity.argsort(descending=True)]
    assert [hit.path for hit in hits] == expected
    np.testing.assert_allclose([h.score for h in hits], similarity.sort(descending=True).values, atol=1e-3)


def test_reranking_adds_the_itm_logit_to_cosine_over_temperature(index: Index, model: Blip2, photos: Path) -> None:
    plain = index.search(TEXT, k=12, rerank=0)
    hits = index.search(TEXT, k=12, rerank=5)
    assert [h.path for h in hits[5:]] == [h.path for h in plain[5:]]
    paths = [hit.path for hit in plain[:5]]
    logits = model.match_logits(model.image_kv(model.features(paths)), [TEXT] * 5)
    total = np.array([hit.score for hit in plain[:5]]) * model.stage1.itc_scale + logits[:, 1].numpy()
    assert [h.path for h in hits[:5]] == [paths[n] for n in np.argsort(-total)]
    np.testing.assert_allclose([h.score for h in hits[:5]], np.sort(total)[::-1], atol=1e-3)
    chances = dict(zip(paths, model.match(paths, TEXT).tolist(), strict=True))
    for hit in hits[:5]:
        assert hit.parts["itm"] == pytest.approx(chances[hit.path], abs=1e-4)


def test_a_blank_text_beside_an_image_is_none(index: Index, photos: Path) -> None:
    query = files(photos)[4]
    hits, alone = index.search("  ", query, k=3), index.search(image=query, k=3)
    assert [(hit.path, hit.score, hit.parts) for hit in hits] == [(hit.path, hit.score, hit.parts) for hit in alone]
    assert all(hit.parts.keys() == {"image"} for hit in hits)


def test_image_search_is_the_mean_of_maxima(index: Index, model: Blip2, photos: Path) -> None:
    query = files(photos)[4]
    hits = index.search(image=query, k=12)
    all_BQE, one_QE = model.embed_images(files(photos)), model.embed_images([query])[0]
    expected = [float(np.mean([(b @ q).max() for q in one_QE])) for b in all_BQE]
    assert hits[0].path == str(query)
    assert hits[0].score == pytest.approx(1.0, abs=1e-3)
    assert [h.path for h in hits] == [str(files(photos)[n]) for n in np.argsort(expected)[::-1]]
    np.testing.assert_allclose([h.score for h in hits], sorted(expected, reverse=True), atol=1e-3)


def test_text_and_image_at_once(index: Index) -> None:
    text = {h.path: h.score for h in index.search(TEXT, k=12, rerank=0)}
    query = next(iter(text))
    image = {h.path: h.score for h in index.search(image=query, k=12)}
    hits = index.search(TEXT, query, k=12, rerank=0)
    names = list(text)
    both = np.zeros(12)
    for part in (text, image):
        values = np.array([part[name] for name in names])
        both += (values - values.mean()) / values.std() / 2
    assert [h.path for h in hits] == [names[n] for n in np.argsort(-both)]
    assert hits[0].parts.keys() == {"text", "image"}


def test_stored_captions_are_searched(index: Index, model: Blip2) -> None:
    hits = index.search(TEXT, k=12, rerank=0, within="captions")
    assert [hit.caption for hit in hits[:3]] == [TEXT] * 3
    for hit in hits:
        cosine = float(model.embed_texts(TEXT)[0] @ model.embed_texts(hit.captions[0])[0])
        assert hit.score == pytest.approx(cosine, abs=2e-3)
    assert {hit.caption for hit in hits if hit.key in ("p03", "p07", "p11")} == {"two cats sleep"}
    both = index.search(TEXT, k=12, rerank=0, within="both")
    assert [hit.parts.keys() for hit in both] == [{"text", "caption"}] * 12  # the model captioned six


def test_copies_moves_changes_and_losses(index: Index, model: Blip2, photos: Path, monkeypatch: Any) -> None:
    before = {hit.key: hit.parts["text"] for hit in index.search(TEXT, k=12, rerank=0)}
    shutil.copy(photos / "p01.png", photos / "copy.png")
    (photos / "new").mkdir()
    (photos / "p02.png").rename(photos / "new" / "moved.png")
    shutil.copy(photos / "p04.png", photos / "p05.png")  # p05's image is replaced by one that is known
    (photos / "p07.png").write_bytes(b"no image")
    encoded = []
    real = Builder._encode
    monkeypatch.setattr(Builder, "_encode", lambda self, looks: (encoded.extend(looks), real(self, looks)))
    report = Builder(index.store, model, progress=False).add(list_samples([str(photos)]).samples)
    assert encoded == []
    assert (report.added, report.moved, report.duplicates, report.replaced) == (0, 1, 2, 1)
    assert [bad.reason for bad in report.bad] == ["not an image"]
    after = {hit.key: hit.parts["text"] for hit in Index(Store(index.store.path), model).search(TEXT, k=20, rerank=0)}
    assert after == {("new/moved" if k == "p02" else k): v for k, v in before.items() if k != "p05"}


def test_two_images_that_swap_their_names(model: Blip2, photos: Path, tmp_path: Path) -> None:
    """Each is the other's content by now; one is read again, none is lost."""
    store = Store.create(tmp_path / "i", identify(model, "tiny"), "exact", None)
    Builder(store, model, progress=False).add(list_samples([str(photos)]).samples)
    before = {hit.key: hit.parts["text"] for hit in Index(store, model).search(TEXT, k=12, rerank=0)}
    (photos / "p01.png").rename(photos / "away")
    (photos / "p02.png").rename(photos / "p01.png")
    (photos / "away").rename(photos / "p02.png")
    report = Builder(store, model, progress=False).add(list_samples([str(photos)]).samples)
    assert (report.unchanged, report.replaced, report.moved, report.added) == (10, 1, 1, 1)
    hits = Index(Store(store.path), model).search(TEXT, k=12, rerank=0)
    after = {hit.key: hit.parts["text"] for hit in hits}
    swapped = {"p01": "p02", "p02": "p01"}
    assert after == {key: pytest.approx(before[swapped.get(key, key)], abs=1e-5) for key in before}
    assert {hit.state for hit in hits} == {"ok"}


def test_gone_and_changed_files_are_hits_with_their_state(index: Index, photos: Path) -> None:
    (photos / "p01.png").unlink()
    shutil.copy(photos / "p04.png", photos / "p02.png")
    hits = index.search(TEXT, k=12, rerank=12)
    states = {hit.key: hit.state for hit in hits if hit.state != "ok"}
    assert states == {"p01": "gone", "p02": "changed"}
    assert {hit.key for hit in hits[-2:]} == {"p01", "p02"}  # could not be re-ranked
    assert all(("itm" in hit.parts) == (hit.state == "ok") for hit in hits)


def test_shards_are_indexed_in_place(model: Blip2, tmp_path: Path, photos: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for path in files(photos):
            if path.with_suffix(".txt").exists():
                tar.add(path, path.name)
                tar.add(path.with_suffix(".txt"), path.with_suffix(".txt").name)
    store = Store.create(tmp_path / "i", identify(model, "tiny"), "exact", None)
    builder = Builder(store, model, progress=False)
    assert builder.add(list_samples([str(tmp_path / "s.tar")]).samples).added == 6
    hit = Index(store, model).search(image=photos / "p01.png", k=1)[0]
    assert (hit.key, hit.state, hit.score) == ("p01", "ok", pytest.approx(1, abs=1e-3))
    again = Builder(store, model, progress=False).add(list_samples([str(photos / "p01.png")]).samples)
    assert (again.duplicates, again.added) == (1, 0)


def test_an_open_index_takes_up_what_is_written(index: Index, model: Blip2, photos: Path) -> None:
    open_index = Index.open(index.store.path, model)
    Image.new("RGB", (40, 40), "green").save(photos / "green.png")
    Builder(index.store, model, progress=False).add(list_samples([str(photos)]).samples)
    assert (len(open_index), len(open_index.search(TEXT, k=20, rerank=0))) == (12, 12)
    open_index.refresh()
    assert {hit.key for hit in open_index.search(TEXT, k=20, rerank=0)} >= {"green", "p01"}


def test_an_index_of_another_model_is_refused(index: Index, tiny: Path) -> None:
    other = blip2.load(tiny)
    with torch.no_grad():
        other.stage1.text_proj.weight += 1e-3
    with pytest.raises(ConfigError, match=r"built with tiny \[\w+\], not with .*itm \[\w+\]"):
        Index(index.store, other).search(TEXT)
    assert identify(other, "x").fingerprint != index.store.manifest.model.fingerprint


def test_commands(tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "i", tmp_path / "hits.html"
    code, said, _ = run(capsys, "index", "build", photos, "--out", out, "--model", tiny, "--captions", "--json")
    assert (code, json.loads(said)) == (
        0,
        {"added": 12, "unchanged": 0, "duplicates": 0, "moved": 0, "replaced": 0, "bad": 0, "images": 12},
    )
    (photos / "film.mp4").touch()
    code, said, err = run(capsys, "index", "build", photos, "--out", out, "--model", tiny, "--captions")
    assert (code, said.split(";")[0]) == (0, "0 added, 12 unchanged")
    assert err.splitlines()[-1] == "1 other files not read: 1 .mp4"
    code, said, _ = run(capsys, "search", out, TEXT, "--k", "3", "--json", "--out", page)
    hits = [json.loads(line) for line in said.splitlines()]
    assert len(hits) == 3
    assert all(hit["state"] == "ok" and {"text", "itm"} == hit["parts"].keys() for hit in hits)
    text = page.read_text()
    assert text.count("data:image/jpeg;base64") == 3
    assert "http" not in text
    code, said, _ = run(capsys, "index", "stat", out, "--check", "--json")
    state = json.loads(said)
    assert (state["images"], state["captions"], state["gone"]) == (12, 12, 0)  # the model captioned the other six
    assert (state["check"]["recall"], state["check"]["damaged"]) == (1.0, [])
    (photos / "p01.png").unlink()
    assert run(capsys, "index", "remove", out, "--gone")[1] == "1 removed, 11 left\n"
    assert run(capsys, "index", "remove", out, photos / "below")[1] == "4 removed, 7 left\n"
    code, _, err = run(capsys, "index", "remove", out, "nowhere.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "nothing was removed" in err
    assert run(capsys, "index", "add", out, photos)[1].startswith("4 added, 7 unchanged; 11 images")


def test_lancedb_means_faiss(tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "index",
        "build",
        photos,
        "--out",
        tmp_path / "i",
        "--model",
        tiny,
        "--engine",
        "lancedb",
        "--uri",
        "s3://x",
    ]
    for line in ("12 added; 12 images", "0 added, 12 unchanged"):
        code, out, err = run(capsys, *command)
        assert (code, out.startswith(line), err.count("lancedb is not supported")) == (0, True, int("12 added" in line))
    assert Store(tmp_path / "i").manifest.engine == {"name": "faiss"}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["search", "nowhere", "x"], "no index here"),
        (["search", "{index}"], "nothing to search for"),
        (["search", "{index}", "x", "--k", "0"], "k is 0"),
        (["search", "{index}", "x", "--in", "captions"], "--captions"),
        (["search", "{index}", "--image", "nowhere.jpg"], "nowhere.jpg"),
        (["index", "add", "{index}", "nowhere"], "nowhere"),
        (["index", "remove", "{index}"], "nothing to remove"),
        (["index", "build", "{photos}", "--out", "{index}", "--captions"], "was begun with"),
        (["index", "build", "{photos}", "--out", "{photos}"], "is no index"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    what: str,
    tiny: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: Blip2,
) -> None:
    monkeypatch.setattr("blip2.inference.loading.load_model", lambda options: (model, str(tiny)))
    Store.create(tmp_path / "i", identify(model, str(tiny)), "faiss", None)
    filled = [a.format(index=tmp_path / "i", photos=photos) for a in arguments]
    code, out, err = run(capsys, *filled)
    assert (code, out) == (2, "")
    assert what in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["search", "{index}", TEXT], ["index", "add", "{index}", "{photos}"]])
@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("runs/other", ["runs/other [0000000000000000], not with {tiny} [", "give --model runs/other", "index build"]),
        ("{tiny}", ["{tiny} [0000000000000000], which has changed since", "earlier model with --model", "index build"]),
        (None, ["runs/other [0000000000000000], cannot be loaded (runs/other: ", "where it is now with --model"]),
    ],
)
def test_commands_refuse_an_index_of_another_model(
    command: list[str],
    name: str | None,
    messages: list[str],
    model: Blip2,
    tiny: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Named by --model, retrained in its place, or gone from its place; the index stays as it is."""
    made = (name or "runs/other").format(tiny=tiny)
    model_id = identify(model, made)
    Store.create(tmp_path / "i", dataclasses.replace(model_id, fingerprint="0" * 16), "exact", None)
    before = (tmp_path / "i" / "manifest.json").read_bytes()
    arguments = [part.format(index=tmp_path / "i", photos=photos) for part in command]
    if name is not None:
        monkeypatch.setattr("blip2.inference.loading.load_model", lambda options: (model, str(tiny)))
        arguments += ["--model", str(tiny)]
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    for part in messages:
        assert part.format(tiny=tiny) in err
    assert (tmp_path / "i" / "manifest.json").read_bytes() == before


KILLED = """
import sys
import torch
from blip2.search import build
from blip2.search.build import Builder, list_samples
from blip2.search.store import Store
import blip2
build._SEGMENT = 2
model = blip2.load(sys.argv[1])
model.batch = 1
print("ready", flush=True)
Builder(Store(sys.argv[2]), model, progress=False).add(list_samples([sys.argv[3]]).samples)
"""


def test_kill_9_while_indexing_leaves_a_whole_index(
    model: Blip2, tiny: Path, photos: Path, tmp_path: Path, float32: None
) -> None:
    rng = np.random.default_rng(1)
    for n in range(150):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(photos / f"q{n:03d}.png")
    out = tmp_path / "i"
    Store.create(out, identify(model, "tiny"), "exact", None)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tiny), str(out), str(photos)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        start = time.monotonic()
        while len(Store(out)) < 6 and child.poll() is None and time.monotonic() - start < 60:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    store = Store(out)
    count = len(store)
    assert 6 <= count < 162
    assert len({row.digest for _, row in store.items()}) == count
    assert len(Index(store, model).search(TEXT, k=5, rerank=0)) == 5
    report = Builder(store, model, progress=False).add(list_samples([str(photos)]).samples)
    assert report.unchanged == count
    assert report.added == 162 - count
    paths = sorted(str(p) for p in photos.rglob("*.png"))
    expected = model.similarity(paths, TEXT)[:, 0]
    scores = {hit.path: hit.score for hit in Index(store, model).search(TEXT, k=162, rerank=0)}
    np.testing.assert_allclose([scores[p] for p in paths], expected, atol=1e-3)


def test_segments_are_written_as_it_goes(
    model: Blip2, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in the middle costs what was not written yet, and no more."""
    monkeypatch.setattr(build_module, "_SEGMENT", 4)
    monkeypatch.setattr(model, "batch", 2)
    store = Store.create(tmp_path / "i", identify(model, "tiny"), "exact", None)
    real, calls = Builder._encode, []

    def failing(self: Builder, looks: list[Any]) -> None:
        calls.append(len(looks))
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, looks)

    monkeypatch.setattr(Builder, "_encode", failing)
    with pytest.raises(KeyboardInterrupt):
        Builder(store, model, progress=False).add(list_samples([str(photos)]).samples)
    assert len(Store(tmp_path / "i")) == 4
    monkeypatch.setattr(Builder, "_encode", real)
    assert Builder(store, model, progress=False).add(list_samples([str(photos)]).samples).added == 8


def test_the_model_in_the_manifest_is_a_name_and_a_fingerprint() -> None:
    assert str(ModelId("runs/s1", "0123", 32, 256)) == "runs/s1 [0123]"
