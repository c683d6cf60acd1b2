"""Conversions both ways: bit-exact, opened by transformers' own classes, with LAVIS's keys."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.cli.main import main
from blip2.errors import CheckpointError
from blip2.models.stage1 import Stage1
from blip2.weights.formats import open_checkpoint
from blip2.weights.lazy_tensors import LazyTensor, Tensors, as_bytes

HF = Callable[[str], tuple[Path, Any]]
KINDS = ("opt", "t5", "itm", "instruct-t5", "instruct-llama", "video-t5", "video-llama")
WIDTH = 32  # of the image encoder


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and torch.equal(as_bytes(one[n].read()), as_bytes(other[n].read()))
        for n in one
    )


@pytest.fixture(scope="module")
def ours(hf: HF, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`ours(kind)`: the Hugging Face folder of a kind as a run of ours."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("ours") / kind
            blip2.convert(hf(kind)[0], made[kind], "blip2")
        return made[kind]

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_to_ours_brings_everything(hf: HF, ours: Callable[[str], Path], kind: str) -> None:
    before, after = open_checkpoint(hf(kind)[0]), open_checkpoint(ours(kind))
    absent = {"temp"} | {n for n in after.tensors if n.startswith("qformer.head.")} if kind == "itm" else set()
    assert equal(before.tensors, {n: t for n, t in after.tensors.items() if n not in absent})
    assert (ours(kind) / "vision/config.json").is_file()
    pixels = torch.randn(2, 3, 56, 56)
    one, other = blip2.load(hf(kind)[0], dtype="fp32"), blip2.load(ours(kind), dtype="fp32")
    assert torch.equal(one.vision(pixels), other.vision(pixels))
    if kind == "itm":
        assert other.text_tokenizer.dec_id == one.text_tokenizer.dec_id
        assert torch.equal(one.embed_texts(["two cats"]), other.embed_texts(["two cats"]))
    else:
        decoding = {"beams": 3, "max_tokens": 9}
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
        assert one.caption([picture], **decoding) == other.caption([picture], **decoding)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_hugging_face_and_back_is_bit_exact(ours: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    done = blip2.convert(ours(kind), tmp_path / "hf", "hf")
    assert done.tensors > 50
    blip2.convert(tmp_path / "hf", tmp_path / "back", "blip2")
    assert equal(open_checkpoint(ours(kind)).tensors, open_checkpoint(tmp_path / "back").tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_lavis_and_back_is_bit_exact(ours: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    blip2.convert(ours(kind), tmp_path / "lavis.pth", "lavis")
    found = open_checkpoint(tmp_path / "lavis.pth")
    assert found.format == "lavis"
    assert found.config.stage == open_checkpoint(ours(kind)).config.stage
    assert equal(open_checkpoint(ours(kind)).tensors, found.tensors)
    blip2.convert(tmp_path / "lavis.pth", tmp_path / "back", "blip2")
    assert equal(open_checkpoint(ours(kind)).tensors, open_checkpoint(tmp_path / "back").tensors)
    pixels = torch.randn(2, 3, 56, 56)
    one, other = blip2.load(ours(kind), dtype="fp32"), blip2.load(tmp_path / "back", dtype="fp32")
    # the bias of k is left behind: no change but rounding
    torch.testing.assert_close(one.vision(pixels), other.vision(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_transformers_opens_what_we_write(hf: HF, ours: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    blip2.convert(ours(kind), tmp_path / "hf", "hf")
    theirs, report = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = Blip2Processor.from_pretrained(tmp_path / "hf")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8))
    inputs = processor(images=picture, text="a photo of", return_tensors="pt")
    assert inputs["input_ids"][0, :5].tolist() == [theirs.config.image_token_id] * 5
    start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.int64)} if kind == "t5" else {}
    with torch.no_grad():
        written = theirs.eval()(**inputs, **start).logits
        original = hf(kind)[1](**inputs, **start).logits
    torch.testing.assert_close(written, original, rtol=0, atol=1e-5 * float(original.abs().max()))
    model = blip2.load(ours(kind), dtype="fp32")
    captions = model.caption([picture], beams=2, min_tokens=2, max_tokens=8)
    ids = theirs.generate(**inputs, num_beams=2, min_new_tokens=2, max_new_tokens=8)
    new = ids[0, (1 if kind == "t5" else inputs["input_ids"].shape[1]) :]
    assert model.language_tokenizer.decode(new.tolist()) == captions[0]


def test_transformers_opens_a_retrieval_model(hf: HF, ours: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import Blip2ForImageTextRetrieval, Blip2Processor

    blip2.convert(ours("itm"), tmp_path / "hf", "hf")
    theirs, report = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8))
    inputs = Blip2Processor.from_pretrained(tmp_path / "hf")(images=picture, text="two cats", return_tensors="pt")
    with torch.no_grad():
        for itm in (False, True):
            written = theirs.eval()(**inputs, use_image_text_matching_head=itm).logits_per_image
            original = hf("itm")[1](**inputs, use_image_text_matching_head=itm).logits_per_image
            torch.testing.assert_close(written, original, rtol=0, atol=0)
    ours_itm = blip2.load(ours("itm"), dtype="fp32").match([picture], "two cats")
    torch.testing.assert_close(ours_itm, written.softmax(-1)[:, 1], rtol=1e-5, atol=1e-6)


def test_lavis_keys(ours: Callable[[str], Path], tmp_path: Path) -> None:
    for kind in KINDS:
        blip2.convert(ours(kind), tmp_path / f"{kind}.pth", "lavis")
    first, opt, t5 = (set(torch.load(tmp_path / f"{k}.pth", weights_only=True)["model"]) for k in ("itm", "opt", "t5"))
    layer = "Qformer.bert.encoder.layer.0."
    assert {
        "query_tokens",
        "temp",
        "ln_vision.weight",
        "vision_proj.bias",
        "itm_head.weight",
        "Qformer.bert.embeddings.position_ids",
        "Qformer.bert.embeddings.LayerNorm.weight",
        f"{layer}attention.self.query.weight",
        f"{layer}crossattention.output.LayerNorm.bias",
        f"{layer}intermediate.dense.weight",
        f"{layer}output_query.LayerNorm.weight",
        "Qformer.cls.predictions.transform.LayerNorm.weight",
        "Qformer.cls.predictions.decoder.bias",
        "visual_encoder.blocks.1.attn.q_bias",
        "visual_encoder.patch_embed.proj.weight",
    } <= first
    assert "opt_proj.weight" in opt
    assert "t5_proj.weight" in t5
    assert not any(".intermediate.dense" in name or "word_embeddings" in name or ".cls." in name for name in opt | t5)
    for kind, projection in (("instruct-t5", "t5_proj"), ("instruct-llama", "llm_proj")):
        instruct = set(torch.load(tmp_path / f"{kind}.pth", weights_only=True)["model"])
        assert {f"{projection}.weight", f"{layer}intermediate.dense.weight", f"{layer}output.LayerNorm.bias"} < instruct
        assert {f"Qformer.bert.embeddings.{n}" for n in ("position_ids", "word_embeddings.weight")} < instruct
        assert not any(name.startswith(("Qformer.cls", "itm_head", "temp")) for name in instruct)


@pytest.mark.parametrize("kind", ["video-t5", "video-llama"])
def test_a_film_model_stays_one(hf: HF, ours: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, InstructBlipVideoForConditionalGeneration

    blip2.convert(ours(kind), tmp_path / "hf", "hf")
    theirs, report = InstructBlipVideoForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    before, after = hf(kind)[1].state_dict(), theirs.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_tokens_to_ids("<video>") == theirs.config.video_token_id
    written = json.loads((tmp_path / "hf/processor_config.json").read_text())
    assert (written["processor_class"], written["num_query_tokens"]) == ("InstructBlipVideoProcessor", 5)
    assert (tmp_path / "hf/qformer_tokenizer/tokenizer_config.json").is_file()


def test_a_temperature_and_a_head_travel_through_transformers(ours: Callable[[str], Path], tmp_path: Path) -> None:
    model = blip2.load(ours("itm"), dtype="fp32").stage1
    assert isinstance(model, Stage1)
    blip2.convert(ours("itm"), tmp_path / "hf", "hf")
    back = blip2.load(tmp_path / "hf", dtype="fp32")
    assert back.report is not None
    assert back.report.fresh == ()
    assert torch.equal(back.stage1.temp, model.temp)
    assert torch.equal(back.stage1.qformer.head.dense.weight, model.qformer.head.dense.weight)


def test_a_full_vocabulary_gets_a_row_for_the_image_token(ours: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration

    folder = tmp_path / "run"
    shutil.copytree(ours("opt"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "language")
    tokenizer.add_tokens([f"word{n}" for n in range(8)])
    tokenizer.save_pretrained(folder / "language")
    done = blip2.convert(folder, tmp_path / "hf", "hf")
    assert done.tensors
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    rows = theirs.config.text_config.vocab_size
    assert theirs.config.image_token_id == rows - 1
    assert theirs.get_input_embeddings().weight[-1].abs().sum() == 0
    assert theirs.generation_config.suppress_tokens == [rows - 1]


def test_another_encoder_cannot_go_to_transformers(ours: Callable[[str], Path], tmp_path: Path) -> None:
    found = open_checkpoint(ours("opt"))
    pooled = replace(found, config=replace(found.config, vision=replace(found.config.vision, pool=2)))
    with pytest.raises(CheckpointError, match="vision.pool 2 have no place"):
        blip2.convert(pooled, tmp_path / "hf", "hf")
    assert list(tmp_path.iterdir()) == []


def test_eva_vit_g_of_a_lavis_file(ours: Callable[[str], Path], tmp_path: Path) -> None:
    """Its keys are EVA's; transformers' one bias of q, k and v is cat(q, 0, v)."""
    blip2.convert(ours("itm"), tmp_path / "itm.pth", "lavis")
    raw = torch.load(tmp_path / "itm.pth", weights_only=True)["model"]
    found = open_checkpoint(tmp_path / "itm.pth").vision
    for n in range(2):
        q, v = (raw[f"visual_encoder.blocks.{n}.attn.{kind}_bias"] for kind in "qv")
        joined = found[f"encoder.layers.{n}.self_attn.qkv.bias"]
        assert joined.shape == (3 * WIDTH,)
        assert torch.equal(joined.read(), torch.cat([q, torch.zeros(WIDTH), v]))
        assert q.abs().max() > 0 < v.abs().max()
        assert torch.equal(
            found[f"encoder.layers.{n}.mlp.fc1.weight"].read(), raw[f"visual_encoder.blocks.{n}.mlp.fc1.weight"]
        )
    taken = {name for name in raw if name.startswith("visual_encoder.")}
    assert len(found) == len(taken) - 2  # two biases become one in each of two blocks


@pytest.mark.parametrize("to", ["blip2", "hf"])
def test_converting_holds_a_tensor_or_two(ours: Callable[[str], Path], tmp_path: Path, to: str) -> None:
    """What is read is let go: one tensor being written, or one read back beside its source."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(lazy: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            nonlocal most
            value = lazy.read().clone()
            alive.append(weakref.ref(value))
            most = max(most, sum(ref() is not None for ref in alive))
            return value

        return LazyTensor(lazy.shape, lazy.dtype, read)

    found = open_checkpoint(ours("itm"))
    tensors = {name: counted(lazy) for name, lazy in found.tensors.items()}
    blip2.convert(replace(found, tensors=tensors), tmp_path / "x", to)
    assert len(alive) == 2 * len(tensors)
    assert most <= 2


def test_the_command(hf: HF, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(hf("opt")[0]), tmp_path / "run"
    assert main(["convert", source, str(target), "--to", "blip2", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["from"], out["to"], out["stage"]) == ("hf", "blip2", "stage2")
    assert out["tensors"] > 100
    assert main(["convert", source, str(target), "--to", "blip2"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "x"), "--to", "lavis"]) == 2
    assert "ends in .pth" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
