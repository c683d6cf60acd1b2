"""The completion scripts in the shells themselves; bash everywhere, zsh and fish where they are installed."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blip2.cli.completion import SHELLS, read_commands, script
from blip2.cli.main import main, make_parser


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return make_parser()


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory, parser: argparse.ArgumentParser) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        (folder / shell).write_text(script(shell, parser))
    (folder / "photos").mkdir()
    (folder / "report.html").touch()
    return folder


def needs(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    return path


def bash(scripts: Path, line: str) -> set[str]:
    """What bash offers behind a line, whose last word is being typed."""
    words = line.split(" ")
    code = (
        'source ./bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _blip2 blip2 "${COMP_WORDS[COMP_CWORD]}"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    found = subprocess.run([needs("bash"), "-c", code, "-", *words], cwd=scripts, capture_output=True, text=True)
    assert found.stderr == ""
    return set(found.stdout.split())


def fish(scripts: Path, line: str) -> set[str]:
    command = [needs("fish"), "--no-config", "-c", f"source ./fish; complete -C '{line}'"]
    found = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True)
    assert found.stderr == ""
    return {entry.split("\t")[0] for entry in found.stdout.splitlines()}


OFFERED = [
    ("blip2 ", {"train", "caption", "index", "search", "serve", "explain", "completion"}, {"build", "--model"}),
    ("blip2 ind", {"index"}, {"train"}),
    ("blip2 index ", {"build", "add", "remove", "stat"}, {"index", "train"}),
    ("blip2 index build --c", {"--captions"}, {"--help", "--k"}),
    ("blip2 index build --captions ", {"data", "model"}, {"photos"}),
    ("blip2 caption --quantize n", {"nf4", "none"}, {"int8"}),
    ("blip2 evaluate retrieval --itc", {"--itc-weight"}, {"--beams"}),
    ("blip2 train tiny/st", {"tiny/stage1", "tiny/stage2"}, {"tiny/vqa"}),
    ("blip2 train tiny/stage1 --optim.l", {"--optim.lr"}, {"--data"}),
    ("blip2 completion ", set(SHELLS), {"train"}),
    ("blip2 explain --out rep", {"report.html"}, {"photos"}),
    ("blip2 caption pho", {"photos"}, {"report.html"}),
]


@pytest.mark.parametrize(("line", "offered", "others"), OFFERED)
def test_bash(scripts: Path, line: str, offered: set[str], others: set[str]) -> None:
    found = bash(scripts, line)
    assert offered <= found
    assert not others & found


def test_bash_offers_nothing_for_a_number(scripts: Path) -> None:
    assert bash(scripts, "blip2 search x --k ") == set()


@pytest.mark.parametrize(("line", "offered", "others"), OFFERED)
def test_fish(scripts: Path, line: str, offered: set[str], others: set[str]) -> None:
    found = {entry.rstrip("/") for entry in fish(scripts, line)}
    assert offered <= found
    assert not others & found


@pytest.mark.parametrize(("line", "offered", "others"), OFFERED)
def test_zsh(scripts: Path, line: str, offered: set[str], others: set[str]) -> None:
    """zsh's completion only works at a terminal, so its three ways to offer something are replaced by printing."""
    code = """
    compdef() { :; }
    _files() { print -l -- ${cur}*(N:t); }
    _message() { :; }
    compadd() { [[ $1 == -- ]] && shift; print -l -- ${(M)@:#${cur}*}; }
    _describe() { local list=$@[-1]; print -l -- ${(M)${(@P)list}:#${cur}*} | sed 's/:.*//'; }
    source ./zsh
    words=("$@"); CURRENT=$#
    _blip2
    """
    found = subprocess.run([needs("zsh"), "-f", "-c", code, "-", *line.split(" ")], cwd=scripts, capture_output=True)
    assert found.stderr == b""
    said = set(found.stdout.decode().split())
    assert offered <= said
    assert not others & said


def test_every_command_and_option_is_known(parser: argparse.ArgumentParser) -> None:
    commands = {command.path: command for command in read_commands(parser)}
    assert {("train",), ("data", "convert"), ("evaluate", "vqa")} <= set(commands)
    for path, command in commands.items():
        for flag in command.flags:
            assert flag.help, (path, flag.names)
    settings = {name for flag in commands[("train",)].flags for name in flag.names}
    assert {"--optim.lr", "--loss.itc", "--out", "--init", "--data", "--data.train"} <= settings


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str], scripts: Path) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == (scripts / "bash").read_text()
    with pytest.raises(SystemExit):
        main(["completion", "cmd.exe"])


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, blip2.cli.main as c; c.make_parser(); print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
