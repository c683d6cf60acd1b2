"""Published checkpoints without their weights: keys, shapes and counts, all on the meta device.

What Hugging Face's files hold follows from transformers' own classes; what LAVIS's hold is written out
here from its code (`Blip2Qformer`, `Blip2OPT`, `Blip2T5`, `Blip2T5Instruct`, `Blip2VicunaInstruct`), not from the
maps under test.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2.configs import LanguageConfig, RunConfig
from blip2.estimate.measure import build_on_meta
from blip2.models.freezing import parameter_table
from blip2.models.towers import TOWERS
from blip2.recipes import recipe
from blip2.weights import names
from blip2.weights.formats import open_checkpoint
from blip2.weights.loading import trained_state
from blip2.weights.validate import require_complete

Shapes = dict[str, tuple[int, ...]]
ENCODERS = {"vitg": 1408, "vitl": 1024}
LANGUAGES = {"opt-2.7b": 2560, "opt-6.7b": 4096, "flan-t5-xl": 2048, "flan-t5-xxl": 4096}
DEPTH, D, WORDS = 12, 768, 30523


def run(stage: str, vision: str, language: str = "opt-2.7b") -> RunConfig:
    base = recipe(f"{vision}-opt2.7b/{stage}")
    return replace(base, language=LanguageConfig(name=language))


def ours(stage: str, vision: str, language: str = "opt-2.7b") -> tuple[Any, Shapes]:
    model = build_on_meta(run(stage, vision, language))
    return model, {name: tuple(value.shape) for name, value in trained_state(model).items()}


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int = D) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def lavis_qformer(width: int, *, text: bool) -> Shapes:
    """`Qformer.bert.*` of LAVIS; stage 2 drops the text's embeddings, feed-forwards and head."""
    shapes: Shapes = {"query_tokens": (1, 32, D), **norm("ln_vision", width)}
    shapes |= norm("Qformer.bert.embeddings.LayerNorm")
    for n in range(DEPTH):
        layer = f"Qformer.bert.encoder.layer.{n}"
        for attention in ["attention", *(["crossattention"] if n % 2 == 0 else [])]:
            source = width if attention == "crossattention" else D
            shapes |= linear(f"{layer}.{attention}.self.query", D, D)
            shapes |= linear(f"{layer}.{attention}.self.key", D, source)
            shapes |= linear(f"{layer}.{attention}.self.value", D, source)
            shapes |= linear(f"{layer}.{attention}.output.dense", D, D) | norm(f"{layer}.{attention}.output.LayerNorm")
        for suffix in ["_query", *([""] if text else [])]:
            shapes |= linear(f"{layer}.intermediate{suffix}.dense", 4 * D, D)
            shapes |= linear(f"{layer}.output{suffix}.dense", D, 4 * D) | norm(f"{layer}.output{suffix}.LayerNorm")
    return shapes


def lavis_stage1(width: int) -> Shapes:
    embeddings, head = "Qformer.bert.embeddings", "Qformer.cls.predictions"
    return {
        **lavis_qformer(width, text=True),
        "temp": (),
        f"{embeddings}.position_ids": (1, 512),
        f"{embeddings}.word_embeddings.weight": (WORDS, D),
        f"{embeddings}.position_embeddings.weight": (512, D),
        f"{head}.bias": (WORDS,),
        **linear(f"{head}.transform.dense", D, D),
        **norm(f"{head}.transform.LayerNorm"),
        **linear(f"{head}.decoder", WORDS, D),
        **linear("vision_proj", 256, D),
        **linear("text_proj", 256, D),
        **linear("itm_head", 2, D),
    }


def same_but_for_form(ours: Shapes, theirs: Shapes, table: dict[str, str]) -> None:
    """Every tensor of ours is theirs under the table's name; queries and temperature differ by an axis of one."""
    for name, shape in ours.items():
        want = theirs[table[name]]
        assert shape == want or [n for n in shape if n != 1] == [n for n in want if n != 1], name


@pytest.mark.parametrize("vision", ENCODERS)
def test_lavis_stage_1(vision: str) -> None:
    _, mine = ours("stage1", vision)
    theirs = lavis_stage1(ENCODERS[vision])
    table = names.lavis(DEPTH)
    same_but_for_form(mine, theirs, table)
    left = {name for name in theirs if name not in {table[n] for n in mine}}
    assert all(names.listed(name, names.LAVIS_IGNORED) for name in left)
    assert left == {
        "Qformer.bert.embeddings.position_ids",
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.cls.predictions.decoder.bias",
    }


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("vision", ENCODERS)
def test_lavis_stage_2(vision: str, language: str) -> None:
    _, mine = ours("stage2", vision, language)
    projection = "opt_proj" if language.startswith("opt") else "t5_proj"
    theirs = lavis_qformer(ENCODERS[vision], text=False) | linear(projection, LANGUAGES[language], D)
    table = names.lavis(DEPTH, projection)
    same_but_for_form(mine, theirs, table)
    assert {table[n] for n in mine} == theirs.keys()


def huggingface(kind: str, language: str = "opt-2.7b", vision: str = "vitg") -> Shapes:
    """Tensors of transformers' own model at the published sizes.

    It knows no CLIP: with ViT-L only the bridge behind an encoder of its width is comparable.
    """
    import transformers
    from transformers import Blip2Config

    text = TOWERS[language].config()
    stage1 = kind == "Blip2ForImageTextRetrieval"
    config = Blip2Config(
        text_config=text.to_dict(),
        vision_config={} if vision == "vitg" else {"hidden_size": ENCODERS[vision], "num_hidden_layers": 1},
        qformer_config={
            "vocab_size": WORDS,
            "use_qformer_text_input": stage1,
            "encoder_hidden_size": ENCODERS[vision],
        },
    )
    with torch.device("meta"):
        return {name: tuple(v.shape) for name, v in getattr(transformers, kind)(config).state_dict().items()}


def test_hugging_face_retrieval() -> None:
    model, mine = ours("stage1", "vitg")
    theirs = huggingface("Blip2ForImageTextRetrieval")
    table = names.huggingface(DEPTH)
    known = {name: shape for name, shape in mine.items() if not names.listed(name, names.HF_WITHOUT)}
    same_but_for_form(known, theirs, table)
    bridge = {n for n in theirs if not names.listed(n, names.HF_TOWERS) or "post_layernorm" in n}
    assert {table[name] for name in known} == bridge
    vision = {f"vision_model.{n}": tuple(v.shape) for n, v in model.vision.model.state_dict().items()}
    assert vision == {n: s for n, s in theirs.items() if n.startswith("vision_model.")}


@pytest.mark.parametrize("language", LANGUAGES)
def test_hugging_face_generation(language: str) -> None:
    model, mine = ours("stage2", "vitg", language)
    theirs = huggingface("Blip2ForConditionalGeneration", language)
    table = names.huggingface(DEPTH)
    same_but_for_form(mine, theirs, table)
    bridge = {n for n in theirs if not names.listed(n, names.HF_TOWERS) or "post_layernorm" in n}
    assert {table[name] for name in mine} == bridge
    towers = {f"language_model.{n}": tuple(v.shape) for n, v in model.language_model.model.state_dict().items()}
    assert towers == {n: s for n, s in theirs.items() if n.startswith("language_model.")}


INSTRUCT = {"flan-t5-xl": 2048, "flan-t5-xxl": 4096, "vicuna-7b": 4096, "vicuna-13b": 5120}


def lavis_instruct(language: str) -> Shapes:
    """A trained InstructBLIP of LAVIS: no head of the Q-Former, the words with [DEC]."""
    projection = "t5_proj" if "t5" in language else "llm_proj"
    embeddings = "Qformer.bert.embeddings"
    return {
        **lavis_qformer(1408, text=True),
        f"{embeddings}.position_ids": (1, 512),
        f"{embeddings}.word_embeddings.weight": (WORDS, D),
        f"{embeddings}.position_embeddings.weight": (512, D),
        **linear(projection, INSTRUCT[language], D),
    }


def instruct(language: str) -> tuple[Any, Shapes]:
    base = run("stage2", "vitg", language)
    model = build_on_meta(replace(base, qformer=replace(base.qformer, instruction="prompt")))
    return model, {name: tuple(value.shape) for name, value in trained_state(model).items()}


@pytest.mark.parametrize("language", INSTRUCT)
def test_lavis_instructblip(language: str, tmp_path: Path) -> None:
    """A file of its keys and shapes opens as the model that they are of, complete."""
    theirs = lavis_instruct(language)
    leaked = {"t5_model.encoder.embed_tokens.weight": (32128, 2048)} if "t5" in language else {}
    values = {name: torch.zeros(1).expand(shape) for name, shape in (theirs | leaked).items()}
    torch.save({"model": values}, tmp_path / "x.pth")
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    require_complete(checkpoint)
    mine = instruct(language)[1]
    assert {name: lazy.shape for name, lazy in checkpoint.tensors.items()} == mine
    assert len(mine) == len(theirs) - 1  # position_ids
    config = checkpoint.config
    assert (config.language.name, config.language.question, config.qformer.max_text) == (language, "{}", 128)
    assert config.qformer.instruction == "prompt"
    assert config.language.start == ("</s>" if "vicuna" in language else None)


@pytest.mark.parametrize("language", INSTRUCT)
@pytest.mark.parametrize("kind", ["InstructBlip", "InstructBlipVideo"])
def test_hugging_face_instructblip(kind: str, language: str) -> None:
    import transformers

    model, mine = instruct(language)
    config = getattr(transformers, f"{kind}Config")(
        text_config=TOWERS[language].config().to_dict(), qformer_config={"vocab_size": WORDS}
    )
    with torch.device("meta"):
        built = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    theirs = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    table = names.huggingface(DEPTH, instruct=True)
    same_but_for_form(mine, theirs, table)
    bridge = {n for n in theirs if not names.listed(n, names.HF_TOWERS) or "post_layernorm" in n}
    assert {table[name] for name in mine} == bridge
    for tower, own in (("vision_model", model.vision.model), ("language_model", model.language_model.model)):
        shapes = {f"{tower}.{n}": tuple(v.shape) for n, v in own.state_dict().items()}
        assert shapes == {n: s for n, s in theirs.items() if n.startswith(f"{tower}.")}


def test_instructblip_trains_188_million() -> None:
    """What its paper counts (arXiv 2305.06500, section 3.1) without a projection to the language model."""
    model, _ = instruct("vicuna-7b")
    trained = sum(row.trainable for row in parameter_table(model))
    assert trained / 1e6 == pytest.approx(188.8, abs=0.05)


@pytest.mark.parametrize("language", [None, *LANGUAGES])
def test_bridge_behind_vit_l(language: str | None) -> None:
    kind = "Blip2ForConditionalGeneration" if language else "Blip2ForImageTextRetrieval"
    _, mine = ours("stage2" if language else "stage1", "vitl", language or "opt-2.7b")
    theirs, table = huggingface(kind, language or "opt-2.7b", "vitl"), names.huggingface(DEPTH)
    known = {name: shape for name, shape in mine.items() if not names.listed(name, names.HF_WITHOUT)}
    same_but_for_form(known, theirs, table)
    assert {table[n] for n in known} == {
        n for n in theirs if not names.listed(n, names.HF_TOWERS) or "post_layernorm" in n
    }


def test_eva_vit_g_of_lavis() -> None:
    model = build_on_meta(run("stage1", "vitg"))
    mine = {name: tuple(value.shape) for name, value in model.vision.model.state_dict().items()}
    width, inner = 1408, 6144
    theirs: Shapes = {
        "visual_encoder.cls_token": (1, 1, width),
        "visual_encoder.pos_embed": (1, 257, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, 14, 14),
        "visual_encoder.patch_embed.proj.bias": (width,),
    }
    for n in range(39):
        block = f"visual_encoder.blocks.{n}"
        theirs |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        theirs |= {f"{block}.attn.qkv.weight": (3 * width, width)} | linear(f"{block}.attn.proj", width, width)
        theirs |= linear(f"{block}.mlp.fc1", inner, width) | linear(f"{block}.mlp.fc2", width, inner)
    table = names.eva(39)
    assert set(table.values()) == theirs.keys()
    for name, their in table.items():
        assert mine[name] == theirs[their], name
    rest = {name for name in mine if name not in table}
    assert rest == {f"encoder.layers.{n}.self_attn.qkv.bias" for n in range(39)} | {
        "post_layernorm.weight",
        "post_layernorm.bias",
    }
    assert mine["encoder.layers.0.self_attn.qkv.bias"] == (3 * width,)


@pytest.mark.parametrize(("vision", "millions"), [("vitg", 186.7), ("vitl", 183.2)])
def test_stage_1_trains_188_million(vision: str, millions: float) -> None:
    """The paper says 188M (section 3.1); counted, LAVIS's tensors are 186.7M for ViT-g."""
    model, _ = ours("stage1", vision)
    trained = sum(row.trainable for row in parameter_table(model))
    counted = {n: s for n, s in lavis_stage1(ENCODERS[vision]).items() if not names.listed(n, names.LAVIS_IGNORED)}
    assert trained == sum(torch.Size(shape).numel() for shape in counted.values())
    assert trained / 1e6 == pytest.approx(millions, abs=0.05)


# Table 2 of the paper: millions that train. It has ViT-L with OPT-2.7B and FlanT5-XL only.
TABLE_2 = {
    ("vitl", "opt-2.7b"): 104,
    ("vitl", "flan-t5-xl"): 103,
    ("vitg", "opt-2.7b"): 107,
    ("vitg", "opt-6.7b"): 108,
    ("vitg", "flan-t5-xl"): 107,
    ("vitg", "flan-t5-xxl"): 108,
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("vision", ENCODERS)
def test_stage_2_trains_103_to_108_million(vision: str, language: str) -> None:
    model, shapes = ours("stage2", vision, language)
    trained = sum(row.trainable for row in parameter_table(model))
    assert trained == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 102.5e6 < trained < 108.5e6
    if (vision, language) in TABLE_2:
        assert trained / 1e6 == pytest.approx(TABLE_2[vision, language], abs=1)


def opt(width: int, layers: int) -> int:
    """Attention and a feed-forward of four times the width, with biases and norms; 2,050 positions; a tied head."""
    return layers * (12 * width**2 + 13 * width) + (50272 + 2050) * width + 2 * width


def flan_t5(width: int, inner: int, heads: int) -> int:
    """24 + 24 layers without biases, gated feed-forwards, 32 buckets of distance, an output head of its own."""
    attention, feed_forward = 4 * width * heads * 64, 3 * width * inner
    encoder = 24 * (attention + feed_forward + 2 * width) + width + 32 * heads
    decoder = 24 * (2 * attention + feed_forward + 3 * width) + width + 32 * heads
    return encoder + decoder + 2 * 32128 * width


@pytest.mark.parametrize(
    ("language", "counted", "billions"),
    [
        ("opt-2.7b", opt(2560, 32), 2.65),
        ("opt-6.7b", opt(4096, 32), 6.66),
        ("flan-t5-xl", flan_t5(2048, 5120, 32), 2.85),
        ("flan-t5-xxl", flan_t5(4096, 10240, 64), 11.14),
    ],
)
def test_language_models_are_of_their_published_size(language: str, counted: int, billions: float) -> None:
    rows = {row.name: row for row in parameter_table(ours("stage2", "vitg", language)[0])}
    assert (rows["language_model"].frozen, rows["language_model"].trainable) == (counted, 0)
    assert counted / 1e9 == pytest.approx(billions, abs=0.005)
