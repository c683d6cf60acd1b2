"""`blip2 train RECIPE|CONFIG.yaml|RUN`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from blip2.cli.options import Commands


def add_parser(commands: Commands) -> None:
    """`blip2 train`; settings of the run go to `options.settings`."""
    train = commands.add_parser(
        "train",
        add_help=False,
        help="train a recipe, or resume a run",
        usage="blip2 train RECIPE|CONFIG.yaml|RUN [--data D] [--out RUN] [--init RUN] [--steps N] [--batch N] "
        "[--SETTING VALUE ...]",
        description="Train a recipe (see `blip2 recipes`), the config.yaml of an earlier run, or resume a run folder. "
        "Every setting can be changed by its dotted name; `blip2 train RECIPE --help` lists them.",
    )
    train.add_argument("recipe", nargs="?", help="recipe, config.yaml or run folder")
    train.add_argument("-h", "--help", action="store_true", help="with a recipe: list all its settings")
    train.set_defaults(run=run, parser=train, settings=[])


def run(options: argparse.Namespace) -> int:
    """Train, or print the settings of a recipe."""
    from blip2.cli.overrides import base_config, help_text, with_overrides

    if options.recipe is None:
        options.parser.print_help()
        return 0 if options.help else 2
    base = base_config(options.recipe)
    if Path(options.recipe).is_dir():
        base = replace(base, out=options.recipe)
    if options.help:
        print(help_text(base))
        return 0
    config = with_overrides(base, options.settings)
    from blip2.training.run import train

    return train(config)
