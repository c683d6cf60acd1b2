"""`blip2 explain`: the page holds every map and nothing from elsewhere; JSON holds the numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2.cli.main import main
from blip2.io.figures import colours, encoder_view, overlay


def test_a_page_and_numbers(tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out" / "report.html"
    text = "a <b>dog</b>"
    assert main(["explain", str(photos / "p01.png"), text, "--model", str(tiny), "--out", str(page), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    queries = np.array(output["queries"])
    assert queries.shape == (2, 5, 17)
    np.testing.assert_allclose(queries.sum(axis=-1), 1, atol=1e-4)
    assert output["winner"] == int(np.argmax(output["itc"]))
    html = page.read_text()
    # the image, ITC and ITM in all and in each of two layers, five queries in two layers
    assert html.count("data:image/png;base64,") == 1 + 2 * 3 + 5 * 2
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", html) == []
    assert "http" not in html
    assert "<b>dog" not in html
    assert "a &lt;b&gt;dog" in html
    assert html.count("<img") == html.count("alt=")


def test_a_stage_2_model_explains_its_words(
    tiny_opt: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert main(["explain", str(photos / "p01.png"), "--model", str(tiny_opt), "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "caption:" in printed
    assert "attention to the soft prompts" in printed
    assert "What each word of the caption drew on" in page.read_text()


def test_queries_over_a_data_set(tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "p01.txt").write_text("a <script>dog</script>")
    page = tmp_path / "queries.html"
    given = ["explain", "--data", str(photos), "--model", str(tiny), "--out", str(page)]
    assert main([*given, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["images"], output["texts"], len(output["bad"])) == (6, 6, 0)
    assert sum(query["wins"] for query in output["queries"]) == pytest.approx(1, abs=1e-4)
    maps = np.array([query["map"] for query in output["queries"]])
    assert maps.shape == (5, 2, 17)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-4)
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 5 + sum(len(query["examples"]) for query in output["queries"])
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", html) == []
    assert "<script" not in html
    assert html.count("<img") == html.count("alt=")
    assert main([*given, "--limit", "2"]) == 0
    assert "over 2 images and 2 texts" in capsys.readouterr().out


def test_an_image_or_a_data_set(tiny: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        [],
        [str(photos / "p01.png"), "--data", str(photos)],
        ["--limit", "3"],
        ["--data", str(photos), "--limit", "0"],
    ):
        assert main(["explain", *wrong, "--model", str(tiny)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_mistakes_are_one_line(tiny_opt: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "nowhere.jpg"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["explain", str(photos / "p01.png"), "a dog", "--model", str(tiny_opt)]) == 2
    assert "stage-1 checkpoint" in capsys.readouterr().err


def test_a_map_lies_where_its_patches_are() -> None:
    heat = np.zeros((4, 4))
    heat[1, 3] = 5.0
    shown = np.asarray(overlay(Image.new("RGB", (80, 40), "white"), heat, share=1.0)).astype(int)
    assert (shown[10:20, 60:80] == colours(np.array(1.0))).all()
    shown[10:20, 60:80] = colours(np.array(0.0))
    assert (shown == colours(np.array(0.0))).all()


def test_a_map_of_nothing_is_dark() -> None:
    shown = np.asarray(overlay(Image.new("RGB", (8, 8), "white"), np.zeros((2, 2)), share=1.0))
    assert (shown == colours(np.array(0.0))).all()


def test_the_view_is_what_the_encoder_saw() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert encoder_view(wide, "crop", 280).getcolors() == [(280 * 280, (0, 0, 255))]
    assert encoder_view(wide, "squash", 280).getpixel((5, 5)) == (255, 0, 0)
