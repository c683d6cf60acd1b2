"""`blip2 completion bash|zsh|fish`: a script that completes commands, options and their values.

shtab makes it from the parsers: the script is static, pressing Tab starts no Python. The dotted settings of
`blip2 train` and `blip2 estimate` are those of `RunConfig`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from blip2.cli.options import Commands

SHELLS = ("bash", "zsh", "fish")


def add_parser(commands: Commands) -> None:
    """`blip2 completion`."""
    completion = commands.add_parser(
        "completion",
        help="a script that completes commands and options in a shell",
        description="Prints a script. bash: blip2 completion bash > ~/.local/share/bash-completion/completions/blip2; "
        "zsh: blip2 completion zsh > DIR/_blip2, DIR of $fpath; "
        "fish: blip2 completion fish > ~/.config/fish/completions/blip2.fish.",
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    from blip2.cli.main import make_parser

    sys.stdout.write(script(options.shell, make_parser()))
    return 0


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script of a shell; adds the settings of a run to the parsers."""
    import shtab

    for command in parsers(parser):
        if command.get_default("settings") is not None:
            for name in settings():
                command.add_argument(name, help="setting of the run")
        for action in command._actions:
            takes_value = action.nargs != 0 and action.type not in (int, float)
            if takes_value and not action.choices:
                action.complete = _recipes() if action.dest == "recipe" else shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell) + "\n"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def settings() -> list[str]:
    """The dotted settings of a run as options, and the short names of some."""
    from dataclasses import fields, is_dataclass

    from blip2.cli.overrides import SHORT
    from blip2.configs import RunConfig

    names = list(SHORT)
    config = RunConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        names += [f"--{field.name}.{f.name}" for f in fields(value)] if is_dataclass(value) else [f"--{field.name}"]
    return names


def _recipes() -> dict[str, str | dict[str, str]]:
    """How each shell completes a recipe's name or a file."""
    from blip2.recipes import RECIPES

    names = " ".join(RECIPES)
    return {
        "bash": "_blip2_recipe_or_file",
        "zsh": "_blip2_recipe_or_file",
        "fish": f"{names} (__fish_complete_path (commandline -ct))",
        "preamble": {
            "bash": f'_blip2_recipe_or_file() {{ compgen -W "{names}" -- $1; compgen -f -- $1; }}',
            "zsh": f"_blip2_recipe_or_file() {{ _alternative 'recipes:recipe:({names})' 'files:file:_files' }}",
        },
    }
