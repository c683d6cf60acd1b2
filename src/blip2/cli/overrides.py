"""A recipe and what the command line changes in it: every setting by its dotted name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2.configs import RunConfig, flat
from blip2.errors import ConfigError

# Short options for what is changed most.
SHORT = {"--data": "--data.train", "--steps": "--train.steps", "--batch": "--train.batch"}


def base_config(name: str) -> RunConfig:
    """The configuration that a recipe name, a `config.yaml` or a run folder stands for."""
    if Path(name).exists():
        from blip2.weights.runs import read_config

        return read_config(name)
    from blip2.recipes import recipe

    return recipe(name)


def with_overrides(base: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """`base` with command-line arguments such as `--optim.lr 2e-4 --steps 100` applied.

    Other training data bring their own dev set (`NAME:train`: `NAME:dev`), or none unless it is named.

    Raises:
        ConfigError: an unknown option, or a value of the wrong type or refused by its config.
    """
    parser = _parser(base)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = parser.parse_args(_with_dev(_of_today(arguments), base.data.train))
            built = parser.instantiate_classes(parsed)
    except Exception as error:  # jsonargparse wraps every kind in its own
        if isinstance(_root(error), ConfigError):
            raise ConfigError(str(_root(error))) from error
        raise ConfigError(_first_line(error)) from error
    config: RunConfig = built.config if hasattr(built, "config") else RunConfig(**vars(built))
    return config


def help_text(base: RunConfig) -> str:
    """All settings with their values in `base`."""
    return str(_parser(base).format_help())


def _parser(base: RunConfig) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, prog="blip2 train RECIPE", default_env=False)
    parser.add_class_arguments(RunConfig)
    parser.set_defaults(flat(base))
    return parser


def _of_today(arguments: Sequence[str]) -> list[str]:
    """Options in full; `--qformer.question true` of earlier versions as `--qformer.instruction question`."""
    out: list[str] = []
    for argument in map(_long, arguments):
        if out and out[-1] == "--qformer.question":
            out[-1] += f"={argument}"
        else:
            out.append(argument)
    values = {"--qformer.question=true": "question", "--qformer.question=false": "null"}
    return [f"--qformer.instruction={values[a.lower()]}" if a.lower() in values else a for a in out]


def _long(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return SHORT.get(name, name) + equals + value


def _with_dev(arguments: list[str], before: str) -> list[str]:
    """A recipe's dev set belongs to its training set, and goes with it."""
    given = {name: value for name, _, value in (a.partition("=") for a in arguments)}
    if "--data.train" not in given or "--data.dev" in given:
        return arguments
    place = next(n for n, a in enumerate(arguments) if a.partition("=")[0] == "--data.train")
    following = arguments[place + 1] if place + 1 < len(arguments) else ""
    train = given["--data.train"] or following
    if train == before:
        return arguments
    dev = f"{train.removesuffix(':train')}:dev" if train.endswith(":train") else "null"
    return [*arguments, f"--data.dev={dev}"]


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__) + ("" if len(lines) < 2 else f" ({lines[-1]})")
