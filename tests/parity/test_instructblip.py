"""InstructBLIP against transformers on the same random weights, as `test_transformers.py` has it for BLIP-2.

The instruction enters the Q-Former and the language model; rows of different lengths are padded in both.
"""

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
from tests.parity.test_transformers import QUERIES, pixels, placeholders, same
from torch import Tensor

import blip2
from blip2.cli.main import main
from blip2.configs import DecodingConfig
from blip2.weights.formats import open_checkpoint

HF = Callable[[str], tuple[Path, Any]]
KINDS = ("instruct-t5", "instruct-llama")
INSTRUCTIONS = ["what is it?", "a photo of two cats on the red sofa", "Question: what is it? Answer:"]
ANSWERS = ["a dog", "two cats on a red sofa", "it"]


def read_by_qformer(model: blip2.Blip2, texts: list[str]) -> dict[str, Tensor]:
    """transformers' inputs of the Q-Former."""
    ids, mask = model.text_tokenizer(texts)
    assert not mask.all()
    return {"qformer_input_ids": ids, "qformer_attention_mask": mask.long()}


def soft_prompts(model: blip2.Blip2, texts: list[str]) -> Tensor:
    """With gradients."""
    assert model.stage2 is not None
    assert model.instruction_reader is not None
    return model.stage2.soft_prompts(model.vision(pixels()), *(model.instruction_reader(texts, None) or ()))


@pytest.mark.parametrize("kind", KINDS)
def test_soft_prompts(hf: HF, kind: str) -> None:
    folder, theirs = hf(kind)
    ours = blip2.load(folder, dtype="fp32")
    assert ours.report is not None
    assert ours.report.fresh == ours.report.left_out == ()
    with torch.no_grad():
        want = theirs.get_image_features(pixels(), **read_by_qformer(ours, INSTRUCTIONS), return_dict=True)
        soft = ours.soft_prompts(ours.vision(pixels()), INSTRUCTIONS)
        same(soft, want.pooler_output)
        # each of them alone, without padding, and another instruction gives others
        for n, text in enumerate(INSTRUCTIONS):
            same(ours.soft_prompts(ours.vision(pixels()[n : n + 1]), [text]), soft[n : n + 1])
        assert (soft[0] - ours.soft_prompts(ours.vision(pixels()), INSTRUCTIONS[::-1])[0]).abs().max() > 1e-2


def test_decoder_logits_loss_and_gradients(hf: HF) -> None:
    folder, theirs = hf("instruct-llama")
    ours = blip2.load(folder, dtype="fp32")
    assert ours.stage2 is not None
    ids, mask, labels = ours.language_tokenizer.targets(INSTRUCTIONS, ANSWERS)
    loss = ours.stage2.language_model.decoder_loss(soft_prompts(ours, INSTRUCTIONS), ids, mask, labels)
    inputs = placeholders(theirs, ids, mask) | read_by_qformer(ours, INSTRUCTIONS)
    shifted = torch.full_like(inputs["input_ids"], -100)
    shifted[:, QUERIES:] = ids.masked_fill(~labels, -100)
    reference = theirs(pixel_values=pixels(), labels=shifted, **inputs)
    torch.testing.assert_close(loss, reference.loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    reference.loss.backward()
    stage = ours.stage2
    same(stage.language_proj.weight.grad, theirs.language_projection.weight.grad)
    same(stage.qformer.query_tokens.grad, theirs.query_tokens.grad[0])
    same(stage.qformer.embeddings.word.weight.grad, theirs.qformer.embeddings.word_embeddings.weight.grad)
    layer, other = stage.qformer.layers[0], theirs.qformer.encoder.layer[0]
    same(layer.text_ff.up.weight.grad, other.intermediate.dense.weight.grad)
    same(layer.cross_attention.key.weight.grad, other.crossattention.attention.key.weight.grad)
    theirs.zero_grad()


def test_encoder_decoder_loss_and_gradients(hf: HF) -> None:
    folder, theirs = hf("instruct-t5")
    ours = blip2.load(folder, dtype="fp32")
    assert ours.stage2 is not None
    parts = ours.language_tokenizer.pairs(INSTRUCTIONS, ANSWERS)
    loss = ours.stage2.language_model.encoder_decoder_loss(soft_prompts(ours, INSTRUCTIONS), *parts)
    enc_ids, enc_mask, dec_ids, dec_mask = parts
    inputs = placeholders(theirs, enc_ids, enc_mask) | read_by_qformer(ours, INSTRUCTIONS)
    want = theirs(pixel_values=pixels(), labels=dec_ids.masked_fill(~dec_mask, -100), **inputs).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    want.backward()
    same(ours.stage2.language_proj.weight.grad, theirs.language_projection.weight.grad)
    words = theirs.qformer.embeddings.word_embeddings.weight.grad
    same(ours.stage2.qformer.embeddings.word.weight.grad, words)
    theirs.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 5])
def test_generated_ids(hf: HF, kind: str, beams: int) -> None:
    folder, theirs = hf(kind)
    ours = blip2.load(folder, dtype="fp32")
    assert ours.stage2 is not None
    tokenizer = ours.language_tokenizer
    ids, mask = tokenizer.prompts(INSTRUCTIONS)
    assert not mask.all()
    theirs_ids, theirs_mask = ids, mask
    if kind == "instruct-t5":  # T5's tokenizer pads on the right: no gap of positions behind the image tokens
        order = mask.long().argsort(dim=1, descending=True, stable=True)
        theirs_ids, theirs_mask = ids.gather(1, order), mask.gather(1, order)
    with torch.no_grad():
        written = ours.stage2.language_model.generate(
            *(soft_prompts(ours, INSTRUCTIONS), ids, mask),
            DecodingConfig(beams=beams, min_tokens=3, max_tokens=12, length_penalty=-1.0),
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
        )
        want = theirs.generate(
            pixels(),
            **placeholders(theirs, theirs_ids, theirs_mask),
            **read_by_qformer(ours, INSTRUCTIONS),
            do_sample=False,
            num_beams=beams,
            min_new_tokens=3,
            max_new_tokens=12,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.pad_id,
            **({"length_penalty": -1.0} if beams > 1 else {}),
        )
    skip = 1 if kind == "instruct-t5" else QUERIES + ids.shape[1]
    assert torch.equal(written, want[:, skip:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_answers_in_transformers_as_here(hf: HF, kind: str, tmp_path: Path) -> None:
    """Its own processor prepares image and instruction: both tokenizers, the size and the placeholders are right."""
    from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

    blip2.convert(hf(kind)[0], tmp_path / "run", "blip2")
    blip2.convert(tmp_path / "run", tmp_path / "hf", "hf")
    theirs, report = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = InstructBlipProcessor.from_pretrained(tmp_path / "hf")
    assert (tmp_path / "hf/qformer_tokenizer/tokenizer.json").is_file()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8))
    model = blip2.load(tmp_path / "run", dtype="fp32")
    for text in INSTRUCTIONS:
        inputs = processor(images=picture, text=text, return_tensors="pt")
        assert torch.equal(inputs["qformer_input_ids"], model.text_tokenizer([text])[0])
        assert torch.equal(inputs["input_ids"][:, QUERIES:], model.language_tokenizer.prompts([text])[0])
        ids = theirs.eval().generate(**inputs, num_beams=2, min_new_tokens=2, max_new_tokens=8)
        new = ids[0, (1 if kind == "instruct-t5" else inputs["input_ids"].shape[1]) :]
        want = model.language_tokenizer.decode(new.tolist())
        options = {"beams": 2, "min_tokens": 2, "max_tokens": 8, "length_penalty": 1.0}
        assert model.ask(picture, text, **options) == [want]
        assert model.caption(picture, prompt=text, **options) == [want]


def test_several_instructions_about_one_image(hf: HF) -> None:
    """Each gets soft prompts of its own, though the image is encoded once: the answers of asking one at a time."""
    model = blip2.load(hf("instruct-llama")[0], dtype="fp32")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    options = {"beams": 2, "min_tokens": 2, "max_tokens": 8}
    answers = model.ask_many(picture, INSTRUCTIONS, **options)[0]
    assert answers == [model.ask(picture, text, **options)[0] for text in INSTRUCTIONS]
    scores = [model.rank_answers(picture, text, ANSWERS)[0] for text in INSTRUCTIONS]
    assert all(answer in ANSWERS for answer in scores)


def film() -> Tensor:
    """Two films of four frames."""
    return torch.randn(2, 4, 3, 56, 56, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["video-t5", "video-llama"])
@pytest.mark.parametrize("beams", [1, 5])
def test_films(hf: HF, kind: str, beams: int) -> None:
    """Each frame goes through encoder and Q-Former with the instruction; the soft prompts follow each other."""
    folder, theirs = hf(kind)
    ours = blip2.load(folder, dtype="fp32")
    assert ours.frames == 4
    assert ours.stage2 is not None
    texts = INSTRUCTIONS[:2]
    tokenizer = ours.language_tokenizer
    ids, mask = tokenizer.prompts(texts)
    read = read_by_qformer(ours, texts)
    theirs_ids, theirs_mask = ids, mask
    if kind == "video-t5":  # as in `test_generated_ids`
        order = mask.long().argsort(dim=1, descending=True, stable=True)
        theirs_ids, theirs_mask = ids.gather(1, order), mask.gather(1, order)
    tokens = torch.full((2, 4 * QUERIES), theirs.config.video_token_id)
    inputs = {
        "input_ids": torch.cat([tokens, theirs_ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(tokens), theirs_mask.long()], dim=1),
    }
    with torch.no_grad():
        features = ours.vision(film().flatten(0, 1)).unflatten(0, (2, 4))
        soft = ours.soft_prompts(features, texts)
        same(soft, theirs.get_video_features(film(), **read, return_dict=True).pooler_output)
        written = ours.stage2.language_model.generate(
            *(soft, ids, mask),
            DecodingConfig(beams=beams, min_tokens=3, max_tokens=12, length_penalty=-1.0),
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
        )
        want = theirs.generate(
            film(),
            **inputs,
            **read,
            do_sample=False,
            num_beams=beams,
            min_new_tokens=3,
            max_new_tokens=12,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.pad_id,
            **({"length_penalty": -1.0} if beams > 1 else {}),
        )
    skip = 1 if kind == "video-t5" else 4 * QUERIES + ids.shape[1]
    assert torch.equal(written, want[:, skip:])


def test_heatmaps_are_those_of_the_prompt(hf: HF) -> None:
    """What the words of a caption look at goes through queries that have read the caption's instruction."""
    model = blip2.load(hf("instruct-llama")[0], dtype="fp32")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    maps = model.attend(picture)
    assert maps.queries.shape == (2, QUERIES, 17)
    model.config = replace(model.config, language=replace(model.config.language, prompt="two cats on a red sofa"))
    assert (model.attend(picture).queries[1] - maps.queries[1]).abs().max() > 1e-4


def test_data_sets_of_several_images_are_evaluated_on_all(hf: HF, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (56, 56), color) for color in ("red", "blue")]
    for n, picture in enumerate(pictures):
        picture.save(tmp_path / f"{n}.png")
    line = {"images": ["0.png", "1.png"], "question": "what is it?", "answer": "a dog", "captions": ["two cats"]}
    (tmp_path / "set.jsonl").write_text(json.dumps(line))
    folder = str(hf("instruct-llama")[0])
    model = blip2.load(folder, dtype="fp32")
    for task, want in (("vqa", model.answer(pictures, "what is it?")), ("caption", model.caption([pictures])[0])):
        out = tmp_path / task
        command = ["evaluate", task, "--data", str(tmp_path / "set.jsonl"), "--model", folder, "--out", str(out)]
        assert main([*command, "--dtype", "fp32"]) == 0
        written = (out / "predictions.jsonl").read_text()
        assert json.loads(written)["answer" if task == "vqa" else "caption"] == want


def test_another_token_in_front(hf: HF, tmp_path: Path) -> None:
    """LAVIS begins Vicuna's prompts with `</s>`, whatever the tokenizer's files say; what is written says so too."""
    from transformers import InstructBlipProcessor

    run = blip2.convert(hf("instruct-llama")[0], tmp_path / "run", "blip2").target
    checkpoint = open_checkpoint(run)
    language = replace(checkpoint.config.language, start="<pad>")
    changed = replace(checkpoint, config=replace(checkpoint.config, language=language))
    blip2.convert(changed, tmp_path / "hf", "hf")
    processor = InstructBlipProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.new("RGB", (56, 56), "red")
    ids = processor(images=picture, text="what is it?", return_tensors="pt")["input_ids"][:, QUERIES:]
    model = blip2.load(tmp_path / "hf", dtype="fp32")
    assert torch.equal(ids, model.language_tokenizer.prompts(["what is it?"])[0])
    assert ids[0, 0] == 1
    plain = blip2.load(run, dtype="fp32").language_tokenizer.prompts(["what is it?"])[0]
    assert plain[0, 0] == 2
    assert torch.equal(plain[:, 1:], ids[:, 1:])
