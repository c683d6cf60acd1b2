"""The page in a real browser: what it does, that it asks no other machine, and axe-core's view of its accessibility.

Needs `pip install 'blip2[browser]'` and a Chromium (`$BLIP2_CHROMIUM`, else `chromium` on the path).
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2.inference import Blip2
from blip2.search.build import Builder, list_samples
from blip2.search.model_id import identify
from blip2.search.query import Index
from blip2.search.store import Store

pytestmark = pytest.mark.slow
VIEWS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: blip2[browser]")
    chromium = os.environ.get("BLIP2_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: install one, or say where in BLIP2_CHROMIUM")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's source."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe-core is not installed: blip2[browser]")
    return (Path(spec.origin).parent / "axe.min.js").read_text("utf-8")


@pytest.fixture
def address(both: Blip2, listening: Any, photos: Path, tmp_path: Path) -> Iterator[str]:
    """A server with a language model, a stage 1 and an index."""
    store = Store.create(tmp_path / "index", identify(both, "tiny"), "exact", "data")
    Builder(store, both, progress=False).add(list_samples([str(photos)]).samples)
    with listening(both, index=Index(store, both)) as (address, _, _):
        yield address


def photo() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (120, 160, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": buffer.getvalue()}


def faults(page: Any, axe: str) -> list[str]:
    """Serious and critical faults that axe-core finds in the page as it is."""
    page.evaluate(axe)
    faults = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [
        f"{fault['id']} ({fault['impact']}): {fault['help']}: {node['html'][:120]} {node.get('failureSummary', '')}"
        for fault in faults
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_visit(browser: Any, axe: str, address: str, view: str, scheme: str) -> None:
    """Caption, ask, follow up, maps and search, mostly by keyboard."""
    width, height = VIEWS[view]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    said: list[str] = []
    requested: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    page.wait_for_selector("#search-section:visible")
    assert faults(page, axe) == []
    page.set_input_files("#file", photo())
    page.wait_for_selector("#captions li")
    page.select_option("#num", "3")
    page.focus("#num")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#captions li:nth-child(3)")
    best = page.inner_text("#captions li:first-child").rpartition(" fits ")[0]
    assert page.get_attribute("#image", "alt").split() == best.split()
    for number, question in enumerate(("what is it?", "where is it?"), 1):
        page.fill("#question", question)
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#talk li:nth-child({number})")
    page.fill("#text", "a dog in the grass")
    page.keyboard.press("Enter")
    page.wait_for_selector(
        "#heatmap:visible" if view == "desktop" else "#side img"
    )  # there the photograph is out of sight
    page.fill("#wanted", "a dog")
    page.keyboard.press("Enter")
    page.wait_for_selector("#hits li:nth-child(12)")
    loaded = "[...document.querySelectorAll('#hits img')].filter(image => image.naturalWidth).length"
    while page.evaluate(loaded) < 12:  # the test's own time limit ends it
        page.wait_for_timeout(100)
    assert faults(page, axe) == []
    page.select_option("#which", "queries")
    assert page.is_visible("#query")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(image => image.alt)")
    if os.environ.get("BLIP2_SHOTS"):
        page.screenshot(path=Path(os.environ["BLIP2_SHOTS"]) / f"{view}-{scheme}.png", full_page=True)
    page.goto(f"{address}/docs")
    assert faults(page, axe) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert said == []
    assert {url for url in requested if not url.startswith((address, "blob:", "data:"))} == set()
    page.close()


@pytest.mark.parametrize("view", VIEWS)
def test_models_side_by_side(
    browser: Any, axe: str, both: Blip2, stage1_only: Blip2, listening: Any, view: str
) -> None:
    width, height = VIEWS[view]
    with listening(both, others=[("second", stage1_only, None)]) as (address, _, _):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#models:visible")
        page.set_input_files("#file", photo())
        page.wait_for_selector("#captions li:nth-child(2)")
        assert page.locator("#captions h3").all_inner_texts() == ["tiny", "second"]
        page.fill("#question", "what is it?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#talk li")
        assert page.locator("#talk .answer").count() == 1  # the second answers no questions
        page.fill("#text", "a dog")
        page.keyboard.press("Enter")
        page.wait_for_selector("#side figure:nth-child(2)")
        assert page.is_hidden("#heatmap")
        assert page.locator("#side figcaption").all_inner_texts() == ["tiny", "second"]
        assert faults(page, axe) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if os.environ.get("BLIP2_SHOTS"):
            page.screenshot(path=Path(os.environ["BLIP2_SHOTS"]) / f"{view}-two.png", full_page=True)
        page.select_option("#chosen", "second")
        page.wait_for_selector("#captions li:not(:has(h3))")
        assert page.locator("#captions li").count() == 1
        assert page.locator("#talk li").count() == 0
        assert said == []
        page.close()


def test_a_mistake_is_said(browser: Any, axe: str, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    page.set_input_files("#file", {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"not a picture"})
    page.wait_for_selector("#message:visible")
    assert "cannot read that image" in page.inner_text("#message")
    assert faults(page, axe) == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_that_commands_write(
    browser: Any, axe: str, both: Blip2, photos: Path, tmp_path: Path, scheme: str
) -> None:
    """`explain` of an image, and of a data set."""
    from blip2.data.images import open_image
    from blip2.data.sources import open_collection
    from blip2.explain.queries import as_dict, write_queries
    from blip2.explain.query_statistics import specialisation
    from blip2.explain.report import write_attention

    picture = open_image(photos / "p01.png")
    write_attention(tmp_path / "image.html", picture, both.attend(picture, "a dog"), "p01.png", "tiny", "squash")
    result = specialisation(both, open_collection(str(photos)).samples)
    write_queries(tmp_path / "queries.html", result, as_dict(result, "photos", "tiny"), "squash")
    page = browser.new_page(color_scheme=scheme)
    for name in ("image.html", "queries.html"):
        page.goto((tmp_path / name).as_uri())
        assert faults(page, axe) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
