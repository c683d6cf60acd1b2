"""`blip2 capfilt` with tiny random models: ours and transformers', each against a plain reference."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.capfilt import engines
from blip2.capfilt.models import Blip2Model, HuggingFaceBlip, HuggingFaceClip, model_type, open_models
from blip2.capfilt.settings import CapFiltSettings, Prompt
from blip2.cli.main import main
from blip2.data.shards.writer import write_shard
from blip2.errors import ConfigError

HF = Callable[[str], tuple[Path, Any]]
TEXTS = [["a dog on the grass", "two cats"], [], ["a red sofa on the grass", "a bird", "what is it?"]]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (60, 70, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, images: list[Image.Image]) -> Path:
    """Three shards of three images."""
    folder = tmp_path_factory.mktemp("in")
    for shard in range(3):
        rows = []
        for n, image in enumerate(images):
            buffer = io.BytesIO()
            image.rotate(30 * shard).save(buffer, "PNG")
            rows.append((f"k{shard}{n}", buffer.getvalue(), {"image_id": f"{shard}{n}", "captions": TEXTS[n][:1]}))
        write_shard(folder / f"s-{shard:05d}.tar", rows)
    return folder


def command(hf: HF, source: Path, out: Path, captioner: str = "opt", ranker: str = "itm") -> list[str]:
    models = ["--captioner", str(hf(captioner)[0]), "--ranker", str(hf(ranker)[0])]
    sizes = ["--samples", "4", "--min-tokens", "2", "--max-tokens", "6", "--batch", "2", "--dtype", "fp32"]
    return ["capfilt", str(source), str(out), *models, *sizes, "--threads", "1", "--json"]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_our_scores_are_those_of_the_public_api(hf: HF, images: list[Image.Image]) -> None:
    model = blip2.load(hf("itm")[0], dtype="fp32")
    ours = Blip2Model(model, CapFiltSettings("x"))
    for scores, reference in (
        (ours.scores(images, TEXTS), lambda p, t: float(model.similarity([p], [t]))),
        (ours.matches(images, TEXTS), lambda p, t: float(model.match([p], [t]))),
    ):
        assert [len(own) for own in scores] == [2, 0, 3]
        for n, own in enumerate(TEXTS):
            assert scores[n] == pytest.approx([reference(images[n], text) for text in own], abs=1e-5)


def test_image_is_encoded_once(hf: HF, images: list[Image.Image]) -> None:
    model = blip2.load(hf("opt")[0], dtype="fp32")
    ranker = blip2.load(hf("itm")[0], dtype="fp32")
    calls: list[int] = []
    for one in (model, ranker):
        one.vision.register_forward_hook(lambda *parts: calls.append(len(parts[2])))
    captioner, judge = (
        Blip2Model(model, CapFiltSettings("x", min_tokens=1, max_tokens=6)),
        Blip2Model(ranker, CapFiltSettings("x")),
    )
    assert [len(texts) for texts in captioner.captions(images, [Prompt(None)] * 3, 5)] == [5, 5, 5]
    assert len(calls) == 1
    judge.scores(images, TEXTS)
    judge.matches(images, TEXTS)
    assert len(calls) == 2


def test_clip_scores_are_those_of_transformers(hf: HF, images: list[Image.Image]) -> None:
    folder, reference = hf("clip")
    ranker = HuggingFaceClip(str(folder), CapFiltSettings("x"), "cpu")
    scores = ranker.scores(images, TEXTS)
    assert [len(own) for own in scores] == [2, 0, 3]
    from blip2.data.images import plain_view

    for n, own in enumerate(TEXTS):
        for m, text in enumerate(own):
            tokens = ranker.tokenizer([text], return_tensors="pt")
            with torch.no_grad():
                out = reference(
                    input_ids=tokens["input_ids"],
                    attention_mask=tokens["attention_mask"],
                    pixel_values=plain_view(images[n], ranker.spec)[None],
                )
            cosine = float(out.logits_per_image / reference.logit_scale.detach().exp())
            assert scores[n][m] == pytest.approx(cosine, abs=1e-5)


def test_blip_draws_captions(hf: HF, images: list[Image.Image]) -> None:
    settings = CapFiltSettings("x", min_tokens=2, max_tokens=6)
    captioner = HuggingFaceBlip(str(hf("blip")[0]), settings, "cpu")
    calls: list[int] = []
    captioner.model.vision_model.register_forward_hook(lambda *parts: calls.append(1))
    torch.manual_seed(1)
    drawn = captioner.captions(images, [Prompt(None)] * 3, 5)
    assert calls == [1]
    assert [len(texts) for texts in drawn] == [5, 5, 5]
    assert len({text for texts in drawn for text in texts}) > 5
    torch.manual_seed(1)
    assert captioner.captions(images, [Prompt(None)] * 3, 5) == drawn
    prompted = HuggingFaceBlip(str(hf("blip")[0]), CapFiltSettings("x", min_tokens=1, max_tokens=4), "cpu")
    starts = ["a photo of", "a photo", "a photo of"]
    captions = prompted.captions(images, [Prompt(text) for text in starts], 2)
    assert all(text.startswith(start) for start, texts in zip(starts, captions, strict=True) for text in texts)


def test_captions_of_ours_keep_the_label(hf: HF, images: list[Image.Image]) -> None:
    settings = CapFiltSettings("x", min_tokens=2, max_tokens=4)
    captioner = Blip2Model(blip2.load(hf("opt")[0], dtype="fp32"), settings)
    prompts = [Prompt("a photo of a cat", "a cat"), Prompt(None), Prompt("a photo of")]
    cats, plain, photos = captioner.captions(images, prompts, 2)
    assert all(text.startswith("a cat ") and len(text) > len("a cat ") for text in cats)
    assert not any(text.startswith("a cat") for text in plain + photos)


@pytest.mark.parametrize(("captioner", "ranker"), [("opt", "itm"), ("blip", "clip")])
def test_rerun_is_byte_equal(
    captioner: str, ranker: str, hf: HF, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(hf, source, tmp_path / "a", captioner, ranker)) == 0
    manifest = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert manifest == json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["samples"] == 9
    torch.manual_seed(99)
    one = [*command(hf, source, tmp_path / "b", captioner, ranker), "--part"]
    for part in ("1/2", "0/2"):  # the parts of an array job, in another order
        engines._MODELS.clear()
        assert not (tmp_path / "b" / "manifest.json").exists()
        assert main([*one, part]) == 0
    assert shards(tmp_path / "b") == shards(tmp_path / "a")
    assert (tmp_path / "b" / "manifest.json").read_bytes() == (tmp_path / "a" / "manifest.json").read_bytes()
    with tarfile.open(tmp_path / "a" / "s-00000.tar") as tar:
        entry = json.loads(tar.extractfile("k00.json").read())  # type: ignore[union-attr]
    assert {one["source"] for one in entry["provenance"] + entry["rejected"]} == {"web", "synthetic"}
    assert len(entry["captions"]) == 2


@pytest.mark.slow
def test_killed_process_is_started_again(
    hf: HF, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(hf, source, tmp_path / "whole")) == 0
    capsys.readouterr()
    monkeypatch.setenv("BLIP2_TEST_KILL", str(tmp_path / "killed"))
    monkeypatch.setattr(engines, "_work", killed_once)
    assert main([*command(hf, source, tmp_path / "out"), "--workers", "2"]) == 0
    assert (tmp_path / "killed").exists()
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


_REAL_WORK = engines._work


def killed_once(job: Any, **options: Any) -> dict[str, Any]:
    """The work of a process that the system kills at its first shard."""
    mark = Path(os.environ["BLIP2_TEST_KILL"])
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _REAL_WORK(job, **options)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_bytes_of_the_local_engine(hf: HF, source: Path, tmp_path: Path) -> None:
    assert main(command(hf, source, tmp_path / "local")) == 0
    assert main([*command(hf, source, tmp_path / "ray"), "--engine", "ray"]) == 0
    assert shards(tmp_path / "ray") == shards(tmp_path / "local")
    import ray

    ray.shutdown()


def test_packaged_model_is_no_hub_id(hf: HF) -> None:
    assert [model_type(name) for name in ("tiny", "tiny/stage1")] == [None, None]
    assert [model_type(str(hf(kind)[0])) for kind in ("blip", "clip", "opt")] == ["blip", "clip", "blip-2"]


def test_refusals(
    hf: HF, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="is CLIP and has no ITM head"):
        open_models(CapFiltSettings(str(hf("blip")[0]), str(hf("clip")[0]), itm_threshold=0.5))
    with pytest.raises(ConfigError, match="which does not rank: give --ranker"):
        open_models(CapFiltSettings(str(hf("blip")[0])))
    with pytest.raises(ConfigError, match="is a stage 1, which does not draw captions"):
        open_models(CapFiltSettings(str(hf("itm")[0])))
    captioner, ranker = open_models(CapFiltSettings(str(hf("itm")[0]), samples=0))
    assert captioner is None
    assert isinstance(ranker, Blip2Model)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command(hf, source, tmp_path / "r"), "--engine", "ray"]) == 2
    assert "engine ray needs Ray" in capsys.readouterr().err
    assert main(["capfilt", str(tmp_path), str(tmp_path / "o"), "--captioner", "x"]) == 2
    assert "no .tar shards" in capsys.readouterr().err
