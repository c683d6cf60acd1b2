"""A recipe with what the command line changes: short and dotted names, types, and one-line errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blip2.cli.overrides import SHORT, base_config, help_text, with_overrides
from blip2.configs import RunConfig
from blip2.errors import ConfigError
from blip2.recipes import recipe
from blip2.weights.runs import write_config

BASE = recipe("tiny/stage1")


def setting(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_nothing_changed_changes_nothing() -> None:
    assert with_overrides(BASE, []) == BASE


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--optim.lr", "2e-4"], "optim.lr", 2e-4),
        (["--optim.lr=2e-4"], "optim.lr", 2e-4),
        (["--optim.betas", "[0.8, 0.9]"], "optim.betas", (0.8, 0.9)),
        (["--optim.clip", "null"], "optim.clip", None),
        (["--data", "photos/", "--data.dev", "flickr8k:dev"], "data.train", "photos/"),
        (["--data=photos/", "--data.dev=flickr8k:dev"], "data.train", "photos/"),
        (["--steps", "7"], "train.steps", 7),
        (["--batch", "12"], "train.batch", 12),
        (["--data.augment", "false"], "data.augment", False),
        (["--data.dev", "null"], "data.dev", None),
        (["--data.limit", "100"], "data.limit", 100),
        (["--vision.layer", "-2"], "vision.layer", -2),
        (["--vision.image_size", "null"], "vision.image_size", None),
        (["--init", "runs/s1"], "init", "runs/s1"),
        (["--out", "runs/x"], "out", "runs/x"),
        (["--language.prompt", ""], "language.prompt", ""),
        (["--language.end", "\n"], "language.end", "\n"),
        (["--loss.itc_one_sided", "true"], "loss.itc_one_sided", True),
        (["--train.seed", "3"], "train.seed", 3),
    ],
)
def test_one_setting(arguments: list[str], name: str, value: Any) -> None:
    changed = with_overrides(BASE, arguments)
    assert setting(changed, name) == value
    assert type(setting(changed, name)) is type(value)
    part, _, field = name.rpartition(".")
    before = setting(BASE, name)
    undone = replace(changed, **{part: replace(getattr(changed, part), **{field: before})} if part else {field: before})
    assert undone == BASE


def test_several_settings_and_the_last_one_counts() -> None:
    changed = with_overrides(BASE, ["--steps", "7", "--optim.lr", "1e-3", "--optim.warmup", "2", "--steps", "9"])
    assert (changed.train.steps, changed.optim.lr, changed.optim.warmup) == (9, 1e-3, 2)
    assert changed.vision == BASE.vision


def test_settings_that_hold_only_together_may_come_in_any_order() -> None:
    for arguments in (["--batch", "10", "--train.accumulate", "5"], ["--train.accumulate", "5", "--batch", "10"]):
        changed = with_overrides(BASE, arguments)
        assert (changed.train.batch, changed.train.accumulate) == (10, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr", "-1"], "optim.lr is -1.0: it must be positive"),
        (["--train.precision", "fp16"], "train.precision is 'fp16': it must be one of auto, fp32, bf16"),
        (["--batch", "10", "--train.accumulate", "4"], "train.batch is 10: it must be a multiple of accumulate=4"),
        (["--steps", "many"], "train.steps"),
        (["--steps", "1.5"], "train.steps"),
        (["--optim.speed", "1"], "optim.speed"),
        (["--speed", "1"], "speed"),
        (["stray"], "stray"),
        (["--steps"], "steps"),
        (["--data.augment", "perhaps"], "data.augment"),
        (["--optim.betas", "[0.9]"], "betas"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(BASE, arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


def test_the_base_is_a_recipe_a_file_or_a_run_folder(tmp_path: Path) -> None:
    config = replace(BASE, out="elsewhere", init="runs/s1")
    write_config(tmp_path, config)
    assert base_config("tiny/stage1") == BASE
    assert base_config(str(tmp_path)) == base_config(str(tmp_path / "config.yaml")) == config
    with pytest.raises(ConfigError, match="no recipe or configuration file 'nothing'"):
        base_config("nothing")


def test_values_of_the_base_survive_the_command_line() -> None:
    """None, a tuple, a path-like text and a text that looks like something else."""
    odd = replace(
        BASE,
        init="runs/1",
        vision=replace(BASE.vision, layer=None, image_size=None),
        language=replace(BASE.language, end="\n", prompt="yes"),
        optim=replace(BASE.optim, betas=(0.5, 0.25), clip=None),
        data=replace(BASE.data, train="123", dev=None),
    )
    assert with_overrides(odd, []) == odd
    assert with_overrides(odd, ["--steps", "5"]) == replace(odd, train=replace(odd.train, steps=5))


@pytest.mark.parametrize("option", [["--qformer.question", "true"], ["--qformer.question=True"]])
def test_an_option_of_earlier_versions(option: list[str]) -> None:
    base = recipe("tiny/vqa")
    plain = with_overrides(base, ["--qformer.instruction", "null"])
    assert plain.qformer.instruction is None
    assert with_overrides(plain, option) == base
    assert with_overrides(base, ["--qformer.question", "false", "--steps", "5"]).qformer.instruction is None


def test_help_shows_every_setting() -> None:
    text = help_text(BASE)
    for name in ("--optim.lr", "--train.steps", "--loss.itc_one_sided", "--data.cache_features", "--init"):
        assert name in text
    assert all(long in text for long in SHORT.values())
    # each with its description, from the docstrings of the configs
    assert "number of learned query tokens" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "dev"),
    [
        ([], "flickr8k:dev"),
        (["--data", "photos"], None),
        (["--data=photos"], None),
        (["--data", "flickr8k:train"], "flickr8k:dev"),
        (["--data.train", "easy-vqa:train"], "easy-vqa:dev"),
        (["--data", "photos", "--data.dev", "other"], "other"),
    ],
)
def test_other_training_data_bring_their_own_dev_set(arguments: list[str], dev: str | None) -> None:
    assert with_overrides(recipe("tiny/stage1"), arguments).data.dev == dev


def test_the_same_training_data_keep_their_dev_set() -> None:
    """A run is resumed with the data that it has."""
    base = with_overrides(recipe("tiny/stage1"), ["--data", "photos", "--data.dev", "other"])
    assert with_overrides(base, ["--data", "photos", "--steps", "9"]).data.dev == "other"
