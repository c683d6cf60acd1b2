"""Configurations check themselves, name what is wrong, and survive plain dicts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from blip2 import configs
from blip2.configs import RunConfig, from_dict, to_dict
from blip2.errors import ConfigError
from blip2.recipes import RECIPES, recipe

KINDS = {
    "vision": configs.VisionConfig,
    "qformer": configs.QFormerConfig,
    "language": configs.LanguageConfig,
    "lora": configs.LoraConfig,
    "data": configs.DataConfig,
    "loss": configs.LossConfig,
    "optim": configs.OptimConfig,
    "train": configs.TrainConfig,
    "eval": configs.EvalConfig,
}
REFUSED: list[tuple[str, Any]] = [
    ("vision.name", ""),
    ("vision.pool", 0),
    ("vision.image_size", 8),
    ("vision.resize", "stretch"),
    ("qformer.init", ""),
    ("qformer.queries", 0),
    ("qformer.cross_every", 0),
    ("qformer.embed_dim", -1),
    ("qformer.dropout", 1.0),
    ("qformer.attention_dropout", -0.1),
    ("qformer.max_text", 3),
    ("language.name", ""),
    ("language.question", "What?"),
    ("language.max_text", 1),
    ("language.quantize", "int4"),
    ("lora.rank", -1),
    ("lora.alpha", 0),
    ("lora.dropout", 1.0),
    ("lora.targets", "q_proj,,v_proj"),
    ("lora.targets", ""),
    ("data.train", ""),
    ("data.limit", 0),
    ("data.dev_limit", -1),
    ("data.crop_min", 0),
    ("data.crop_min", 1.5),
    ("data.cache_views", 0),
    ("data.workers", -1),
    ("loss.itc", -1),
    ("loss.temperature", 0),
    ("loss.itc_smoothing", 1.0),
    ("loss.itg_smoothing", -0.1),
    ("optim.lr", 0),
    ("optim.min_lr", 1.0),
    ("optim.warmup_lr", 1.0),
    ("optim.warmup", -1),
    ("optim.betas", (0.9, 1.0)),
    ("optim.weight_decay", -0.1),
    ("optim.clip", 0),
    ("train.steps", 0),
    ("train.batch", 0),
    ("train.precision", "fp16"),
    ("train.parallel", "pipeline"),
    ("train.keep", 0),
    ("train.seed", -1),
    ("eval.images", -1),
    ("eval.beams", 0),
    ("eval.min_tokens", 50),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_refused_value_is_named_with_what_is_allowed(name: str, value: Any) -> None:
    part, setting = name.split(".")
    with pytest.raises(ConfigError) as caught:
        KINDS[part](**{setting: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}: it must be ")
    assert "\n" not in message


def test_settings_that_depend_on_each_other() -> None:
    with pytest.raises(ConfigError, match=r"loss.itc \+ itm \+ itg is 0: it must be positive"):
        configs.LossConfig(itc=0, itm=0, itg=0)
    with pytest.raises(ConfigError, match="train.batch is 10: it must be a multiple of accumulate=4"):
        configs.TrainConfig(batch=10, accumulate=4)
    with pytest.raises(ConfigError, match="num is 6: it must be at most beams"):
        configs.DecodingConfig(num=6)
    assert configs.DecodingConfig(num=6, sample=True).num == 6
    with pytest.raises(ConfigError, match="min_tokens is 40: it must be between 0 and max_tokens"):
        configs.DecodingConfig(min_tokens=40)


def test_defaults_are_the_papers() -> None:
    """Arithmetic of section 3 and of the appendix's tables, where the tiny pair does not differ."""
    assert configs.QFormerConfig().queries == 32
    assert configs.QFormerConfig().embed_dim == 256
    assert configs.LossConfig().temperature == 0.07
    assert (configs.OptimConfig().betas, configs.OptimConfig().weight_decay) == ((0.9, 0.98), 0.05)
    decoding = configs.DecodingConfig()
    assert (decoding.beams, decoding.min_tokens, decoding.max_tokens) == (5, 8, 30)


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_survive_json(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    task = name.split("/")[1].removeprefix("demo-")
    assert config.stage == {
        "caption": "stage2",
        "vqa": "stage2",
        "answers": "stage2",
        "instruct": "stage2",
        "retrieval": "stage1",
        "search": "stage1",
    }.get(task, task)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("name", "batch", "size", "lr", "decay", "beta2"),
    [
        ("vitg-opt2.7b/caption", 256, 364, 1e-5, 1.0, 0.999),
        ("vitg-flant5xl/caption", 256, 364, 1e-5, 0.95, 0.999),
        ("vitg-opt2.7b/vqa", 128, 490, 1e-5, 0.95, 0.999),
        ("vitg-flant5xl/vqa", 128, 490, 1e-5, 0.9, 0.999),
        ("vitg-opt2.7b/retrieval", 224, 364, 1e-5, 0.95, 0.999),
        ("vitl-opt2.7b/retrieval", 224, 364, 5e-6, 1.0, 0.98),
    ],
)
def test_fine_tuning_is_the_papers(name: str, batch: int, size: int, lr: float, decay: float, beta2: float) -> None:
    """Tables 8 to 10 of the appendix."""
    config = recipe(name)
    assert config.vision.train
    assert (config.train.batch, config.vision.image_size) == (batch, size)
    assert (config.optim.lr, config.optim.layer_decay, config.optim.betas) == (lr, decay, (0.9, beta2))
    assert (config.optim.warmup, config.optim.weight_decay) == (1000, 0.05)
    asks = name.endswith("vqa")
    assert (config.qformer.instruction, config.data.texts) == (
        ("question", "questions") if asks else (None, "captions")
    )
    epochs = config.train.steps * batch / (658_111 if asks else 566_747)
    assert epochs == pytest.approx(5, abs=0.01)


@pytest.mark.parametrize(
    ("name", "language", "batch"),
    [
        ("vitg-flant5xl/instruct", "flan-t5-xl", 192),
        ("vitg-flant5xxl/instruct", "flan-t5-xxl", 64),
        ("vitg-vicuna7b/instruct", "vicuna-7b", 128),
        ("vitg-vicuna13b/instruct", "vicuna-13b", 64),
    ],
)
def test_instruction_tuning_is_instructblips(name: str, language: str, batch: int) -> None:
    """arXiv 2305.06500, section 2.6, and LAVIS's lengths of text."""
    config = recipe(name)
    assert (config.language.name, config.train.batch, config.train.steps) == (language, batch, 60_000)
    assert (config.train.eval_every, config.eval.best) == (3000, "loss")
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.warmup_lr, optim.warmup) == (1e-5, 0.0, 1e-8, 1000)
    assert (optim.betas, optim.weight_decay) == ((0.9, 0.999), 0.05)
    assert (config.vision.image_size, config.vision.train, config.lora.rank) == (224, False, 0)
    assert (config.qformer.instruction, config.qformer.max_text, config.language.max_text) == ("prompt", 128, 256)


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no recipe or configuration file 'tiny'; recipes: tiny/stage1, tiny/stage2"):
        recipe("tiny")


def test_missing_settings_take_their_defaults() -> None:
    config = from_dict(RunConfig, {"stage": "stage2", "optim": {"lr": 1e-3, "betas": [0.8, 0.9]}})
    assert config == RunConfig(stage="stage2", optim=configs.OptimConfig(lr=1e-3, betas=(0.8, 0.9)))


def test_every_nested_config_is_read_back_as_itself() -> None:
    """A new part of RunConfig that `from_dict` does not know would come back as a plain dict."""
    read = from_dict(RunConfig, to_dict(RunConfig()))
    for field in dataclasses.fields(RunConfig):
        assert type(getattr(read, field.name)) is type(getattr(RunConfig(), field.name)), field.name


@pytest.mark.parametrize(("before", "now"), [(True, "question"), (False, None)])
def test_files_of_earlier_versions_say_question(before: bool, now: str | None) -> None:
    values = {"stage": "stage2", "data": {"texts": "questions"}, "qformer": {"question": before, "queries": 7}}
    config = from_dict(RunConfig, values)
    assert (config.qformer.instruction, config.qformer.queries) == (now, 7)
    with pytest.raises(ConfigError, match="qformer: unknown setting 'question'"):
        from_dict(RunConfig, {"qformer": {"question": "yes"}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": 1}, "a file: unknown setting 'speed'; known: recipe, stage, out"),
        ({"train": {"speed": 1}}, "a file: train: unknown setting 'speed'; known: steps, batch"),
        ({"train": None}, "a file: train is None"),
        ({"train": 7}, "a file: train is 7"),
        ({"train": {"steps": "many"}}, "a file: train: .*steps"),
        ({"train": {"steps": None}}, "a file: train: .*steps"),
        ({"train": {"steps": 1.5}}, "a file: train: .*steps"),
        ({"optim": {"lr": "fast"}}, "a file: optim: .*lr"),
        ({"optim": {"betas": 0.9}}, "a file: optim: .*betas"),
        ({"data": {"augment": "no"}}, "a file: data: .*augment"),
    ],
)
def test_what_a_file_may_get_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(RunConfig, values, "a file")
    assert "\n" not in str(caught.value)


def test_configs_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().stage = "stage2"  # type: ignore[misc]


def test_recipes_are_listed_without_torch() -> None:
    code = "import sys, blip2.recipes; print([m for m in ('torch', 'transformers', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
