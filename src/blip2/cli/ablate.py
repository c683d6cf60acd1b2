"""`blip2 ablate tiny`."""

from __future__ import annotations

import argparse

from blip2.cli.options import Commands, add_json


def add_parser(commands: Commands) -> None:
    """`blip2 ablate`."""
    ablate = commands.add_parser("ablate", help="what stage 1, ITM, ITG and the Q-Former are worth: a table and a plot")
    ablate.add_argument("base", help="whose recipes: tiny")
    ablate.add_argument(
        "--data", default="flickr8k", help="named set, or folder with train/ and dev/ (default: %(default)s)"
    )
    ablate.add_argument(
        "--out", default="runs/ablate", metavar="DIR", help="resumed where it is (default: %(default)s)"
    )
    for stage in (1, 2):
        ablate.add_argument(
            f"--steps{stage}", type=int, default=128, help=f"steps of stage {stage}, 32 pairs each (default: 128)"
        )
    ablate.add_argument("--images", type=int, default=250, help="dev images (default: %(default)s)")
    ablate.add_argument("--only", metavar="NAME,NAME", help="only these variants")
    add_json(ablate, "one JSON list last")
    ablate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train and compare the variants."""
    from blip2.training.ablate import ablate_command

    return ablate_command(options)
