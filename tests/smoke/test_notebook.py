"""The notebook of docs/domain.md runs from top to bottom, with a few images and steps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "your_own_domain.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_your_own_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("easy_vqa")
    for name, value in {"IMAGES": "30 3 2", "STEPS": "3", "SHOWN": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs hold images of others: clear them"

    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    done = client.execute()

    printed = ["".join(o.get("text", "") for o in cell.get("outputs", ())) for cell in done.cells]
    assert any("30 usable samples" in text for text in printed)
    assert any("accuracy" in text for text in printed)
    scores = next(text for text in printed if "images shuffled" in text).splitlines()
    assert [line.rsplit(None, 1)[0].strip() for line in scores] == [
        "tiny",
        "runs/domain",
        "runs/domain, images shuffled",
    ]
    assert all(0 <= float(line.rsplit(None, 1)[1]) <= 100 for line in scores)
    pages = [o["data"]["text/html"] for cell in done.cells for o in cell.get("outputs", ()) if "data" in o]
    assert len(pages) == 1
    assert "heatmap" in pages[0]
    assert pages[0].count("<img") >= 2
    assert (tmp_path / "runs/domain/report.html").is_file()
