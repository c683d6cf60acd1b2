"""`blip2 completion bash|zsh|fish`: a script that completes commands, options and their values.

The script is static, made from the parsers themselves: pressing Tab starts no Python. The dotted settings of
`blip2 train` and `blip2 estimate` are those of `RunConfig`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from blip2.cli.options import Commands

SHELLS = ("bash", "zsh", "fish")
_NUMBERS = (int, float)
Parsers = argparse._SubParsersAction


@dataclass(frozen=True)
class Flag:
    """One option.

    Args:
        names: all spellings.
        help: one line.
        takes: `nothing`, `file` (or any text), `number`, or `choice`.
        choices: the values of `choice`.
    """

    names: tuple[str, ...]
    help: str
    takes: str = "nothing"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """What may follow one command.

    Args:
        path: `()` is `blip2` itself, `("index", "build")` a command of a command.
        children: commands below with their help; where there are any, one of them follows.
        words: known values of the positional argument; files otherwise.
    """

    path: tuple[str, ...]
    flags: tuple[Flag, ...]
    children: tuple[tuple[str, str], ...] = ()
    words: tuple[str, ...] = ()


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
    """The completion script of a shell."""
    commands = list(read_commands(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def read_commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Command]:
    """A parser and all below it; options that are not for people are left out."""
    flags: list[Flag] = []
    words: tuple[str, ...] = ()
    children: Parsers[argparse.ArgumentParser] | None = None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            children = action
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            flags.append(_flag(parser, action))
        elif action.choices:
            words = tuple(map(str, action.choices))
    if path in (("train",), ("estimate",)):
        words, settings = _recipes_and_settings()
        flags += settings
    told = {action.dest: _line(action.help) for action in children._choices_actions} if children else {}
    below = tuple((name, told.get(name, "")) for name in children.choices) if children else ()
    yield Command(path, tuple(flags), below, words)
    for name, child in (children.choices if children else {}).items():
        yield from read_commands(child, (*path, name))


def _flag(parser: argparse.ArgumentParser, action: argparse.Action) -> Flag:
    names = tuple(action.option_strings)
    help_line = _line(parser._get_formatter()._expand_help(action)) if action.help else ""
    if action.nargs == 0:
        return Flag(names, help_line)
    if action.choices:
        return Flag(names, help_line, "choice", tuple(map(str, action.choices)))
    return Flag(names, help_line, "number" if action.type in _NUMBERS else "file")


def _recipes_and_settings() -> tuple[tuple[str, ...], list[Flag]]:
    """Names of the recipes, and every dotted setting of a run."""
    from dataclasses import fields, is_dataclass

    from blip2.cli.overrides import SHORT
    from blip2.configs import RunConfig
    from blip2.recipes import RECIPES

    names: list[str] = list(SHORT)
    config = RunConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        names += [f"--{field.name}.{f.name}" for f in fields(value)] if is_dataclass(value) else [f"--{field.name}"]
    return tuple(RECIPES), [Flag((name,), "setting of the run", "file") for name in names]


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


# -- bash ------------------------------------------------------------------------------------------


def _bash(commands: list[Command]) -> str:
    paths = "|".join(shlex.quote(" ".join(c.path)) for c in commands if c.path)
    cases = []
    for command in commands:
        key = " ".join(command.path)
        for flag in command.flags:
            spelled = "|".join(shlex.quote(f"{key}/{name}") for name in flag.names)
            if flag.takes == "choice":
                cases.append(f"    {spelled}) words={shlex.quote(' '.join(flag.choices))} ;;")
            elif flag.takes == "number":
                cases.append(f"    {spelled}) return ;;")
            elif flag.takes == "file":
                cases.append(f"    {spelled}) files=1 ;;")
    options = [_bash_words(c, "options", [name for f in c.flags for name in f.names]) for c in commands if c.flags]
    follow = [_bash_words(c, "follow", [name for name, _ in c.children] or list(c.words)) for c in commands]
    return _BASH.format(paths=paths, cases="\n".join(cases), options="\n".join([*options, *filter(None, follow)]))


def _bash_words(command: Command, kind: str, words: list[str]) -> str:
    if not words:
        return ""
    key = shlex.quote(f"{kind}/{' '.join(command.path)}")
    return f"    {key}) words={shlex.quote(' '.join(words))} ;;"


_BASH = """\
# bash completion of blip2, written by `blip2 completion bash`
_blip2() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} path= words= files= i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "${{path:+$path }}${{COMP_WORDS[i]}}" in
    {paths}) path="${{path:+$path }}${{COMP_WORDS[i]}}" ;;
    esac
  done
  COMPREPLY=()
  case "$path/$prev" in
{cases}
  esac
  if [[ -z $words && -z $files ]]; then
    local kind=follow
    [[ $cur == -* ]] && kind=options
    case "$kind/$path" in
{options}
    esac
  fi
  if [[ -n $words ]]; then
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
  fi
  if [[ ${{#COMPREPLY[@]}} -eq 0 && $cur != -* ]]; then
    compopt -o filenames 2> /dev/null
    mapfile -t COMPREPLY < <(compgen -f -- "$cur")
  fi
}}
complete -F _blip2 blip2
"""


# -- zsh -------------------------------------------------------------------------------------------


def _zsh(commands: list[Command]) -> str:
    paths = "|".join(shlex.quote(" ".join(c.path)) for c in commands if c.path)
    values, options, follow = [], [], []
    for command in commands:
        key = " ".join(command.path)
        for flag in command.flags:
            spelled = "|".join(shlex.quote(f"{key}/{name}") for name in flag.names)
            if flag.takes == "choice":
                values.append(f"    {spelled}) compadd -- {shlex.join(flag.choices)}; return ;;")
            elif flag.takes == "number":
                values.append(f"    {spelled}) _message number; return ;;")
            elif flag.takes == "file":
                values.append(f"    {spelled}) _files; return ;;")
        told = [f"{_colon(name)}:{flag.help}" for flag in command.flags for name in flag.names]
        if told:
            options.append(f"    {shlex.quote(key)}) told=({shlex.join(told)}) ;;")
        after = [f"{_colon(name)}:{what}" for name, what in command.children] or list(map(_colon, command.words))
        if after:
            follow.append(f"    {shlex.quote(key)}) told=({shlex.join(after)}) ;;")
    return _ZSH.format(paths=paths, values="\n".join(values), options="\n".join(options), follow="\n".join(follow))


def _colon(name: str) -> str:
    return name.replace(":", "\\:")


_ZSH = """\
#compdef blip2
# zsh completion of blip2, written by `blip2 completion zsh`
_blip2() {{
  local cur=${{words[CURRENT]}} prev=${{words[CURRENT-1]}} at= i
  local -a told
  for ((i = 2; i < CURRENT; i++)); do
    case "${{at:+$at }}${{words[i]}}" in
    {paths}) at="${{at:+$at }}${{words[i]}}" ;;
    esac
  done
  case "$at/$prev" in
{values}
  esac
  if [[ $cur == -* ]]; then
    case "$at" in
{options}
    esac
    _describe -o option told
    return
  fi
  case "$at" in
{follow}
  esac
  if (( $#told )); then
    _describe command told
    [[ $at == train || $at == estimate ]] && _files
    return 0
  fi
  _files
}}
if [[ ${{funcstack[1]}} == _blip2 ]]; then _blip2 "$@"; else compdef _blip2 blip2; fi
"""


# -- fish ------------------------------------------------------------------------------------------


def _fish(commands: list[Command]) -> str:
    paths = " ".join(_fish_quote(" ".join(c.path)) for c in commands if c.path)
    lines = []
    for command in commands:
        condition = "__blip2_at " + _fish_quote(" ".join(command.path))
        at = f"-n {_fish_quote(condition)}"
        for name, what in command.children:
            lines.append(f"complete -c blip2 -f {at} -a {_fish_quote(name)} -d {_fish_quote(what)}")
        if command.words:
            lines.append(f"complete -c blip2 {at} -a {_fish_quote(' '.join(command.words))}")
        for flag in command.flags:
            spelled = " ".join(
                f"-l {_fish_quote(name[2:])}" if name.startswith("--") else f"-s {_fish_quote(name[1:])}"
                for name in flag.names
            )
            value = {
                "nothing": "",
                "file": " -r",
                "number": " -x",
                "choice": f" -x -a {_fish_quote(' '.join(flag.choices))}",
            }[flag.takes]
            lines.append(f"complete -c blip2 {at} {spelled}{value} -d {_fish_quote(flag.help)}")
    return _FISH.format(paths=paths, lines="\n".join(lines))


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_FISH = """\
# fish completion of blip2, written by `blip2 completion fish`
function __blip2_at
    set -l known {paths}
    set -l at
    for word in (commandline -opc)[2..-1]
        if contains -- "$at$word" $known
            set at "$at$word "
        end
    end
    test (string trim -- "$at ") = "$argv[1]"
end
{lines}
"""
