"""The completion scripts in the shells themselves; bash everywhere, zsh and fish where they are installed."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2.cli.completion import SHELLS, parsers, script
from blip2.cli.main import main, make_parser


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        (folder / shell).write_text(script(shell, make_parser()))
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
        'source ./bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_blip2 blip2 "${COMP_WORDS[COMP_CWORD]}"; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run([needs("bash"), "-c", code, "-", *words], cwd=scripts, capture_output=True, text=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def fish(scripts: Path, line: str) -> set[str]:
    command = [needs("fish"), "--no-config", "-c", f"source ./fish; complete -C '{line}'"]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return {entry.split("\t")[0] for entry in done.stdout.splitlines()}


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
    completions = bash(scripts, line)
    assert offered <= completions
    assert not others & completions


def test_bash_offers_nothing_for_a_number(scripts: Path) -> None:
    assert bash(scripts, "blip2 search x --k ") == set()


@pytest.mark.parametrize(("line", "offered", "others"), OFFERED)
def test_fish(scripts: Path, line: str, offered: set[str], others: set[str]) -> None:
    completions = {entry.rstrip("/") for entry in fish(scripts, line)}
    assert offered <= completions
    assert not others & completions


def zsh(scripts: Path, line: str) -> set[str]:
    """What zsh lists behind a line; its completion works only at a terminal."""
    (scripts / "_blip2").write_text((scripts / "zsh").read_text())
    setup = "stty columns 300 rows 100; PS1=; fpath=($PWD $fpath); autoload -U compinit; compinit -u -D; "
    setup += "bindkey '^I' list-choices; LISTMAX=0; echo READ''Y\n"
    ours, theirs = pty.openpty()
    with subprocess.Popen([needs("zsh"), "-f", "-i"], cwd=scripts, stdin=theirs, stdout=theirs, stderr=theirs) as shell:
        os.write(ours, setup.encode())
        read_until_quiet(ours, "READY")
        os.write(ours, f"{line}\t".encode())
        listed = read_until_quiet(ours, "\n")
        shell.kill()
    os.close(ours)
    os.close(theirs)
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", " ", listed.partition("\n")[2]).splitlines()
    words = {word.rstrip("/") for shown in lines for word in shown.partition(" -- ")[0].split()}
    return words - set(line.split())  # zsh shows the line itself again


def read_until_quiet(terminal: int, expected: str) -> str:
    """What a terminal shows until `expected` came and half a second passed without anything more."""
    text, end = "", time.monotonic() + 30
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
        elif expected in text:
            break
    return text


@pytest.mark.parametrize(("line", "offered", "others"), OFFERED)
def test_zsh(scripts: Path, line: str, offered: set[str], others: set[str]) -> None:
    completions = zsh(scripts, line)
    assert offered <= completions
    assert not others & completions


def test_every_command_and_option_is_known(scripts: Path) -> None:
    text = (scripts / "bash").read_text()
    for parser in parsers(make_parser()):
        for action in parser._actions:
            assert not action.option_strings or action.help, (parser.prog, action.option_strings)
        prefix = "_shtab_" + parser.prog.replace(" ", "_").replace("-", "_")
        line = next(line for line in text.splitlines() if line.startswith(f"{prefix}_option_strings="))
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        options = {name for action in shown for name in action.option_strings}
        if parser.prog in ("blip2 train", "blip2 estimate"):
            options |= {"--optim.lr", "--loss.itc", "--out", "--init", "--data", "--data.train"}
        assert options <= set(line.partition("(")[2].rstrip(")").split()), parser.prog


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str], scripts: Path) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == (scripts / "bash").read_text()
    with pytest.raises(SystemExit):
        main(["completion", "cmd.exe"])


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, blip2.cli.main as c; c.make_parser(); print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
