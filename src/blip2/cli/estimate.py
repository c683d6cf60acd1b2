"""`blip2 estimate RECIPE`."""

from __future__ import annotations

import argparse

from blip2.cli.options import Commands, add_json


def add_parser(commands: Commands) -> None:
    """`blip2 estimate`; settings of the run go to `options.settings`."""
    estimate = commands.add_parser(
        "estimate", help="parameters and memory of a recipe, without any weights; takes --SETTING VALUE too"
    )
    estimate.add_argument("recipe", help="recipe, config.yaml or run folder")
    add_json(estimate)
    estimate.set_defaults(run=run, settings=[])


def run(options: argparse.Namespace) -> int:
    """Print the estimate."""
    from blip2.cli.overrides import base_config, with_overrides

    config = with_overrides(base_config(options.recipe), options.settings)
    from blip2.estimate.measure import estimate

    print(estimate(config, as_json=options.json))
    return 0
