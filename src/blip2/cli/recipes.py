"""`blip2 recipes`."""

from __future__ import annotations

import argparse

from blip2.cli.options import Commands


def add_parser(commands: Commands) -> None:
    """`blip2 recipes`."""
    commands.add_parser("recipes", help="list the recipes").set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print every recipe with the first line of its docstring."""
    from blip2.recipes import RECIPES

    for name, function in RECIPES.items():
        print(f"{name:<22} {(function.__doc__ or '').strip().splitlines()[0]}")
    return 0
