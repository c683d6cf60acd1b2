"""Screenshots for the documentation: the server's page with `tiny`, light and dark, and the curves of a run's report.

    python -m tools.docs_figures --run runs/s1      # writes docs/images/page-*.png and report-*.png

Needs `pip install 'blip2[browser]'` and a Chromium (`$BLIP2_CHROMIUM`, else `chromium` on the path).
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = Path("docs/images")
PORT = 8765


def main() -> None:
    """Take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder whose curves are shown")
    parser.add_argument("--no-page", action="store_true", help="leave the server's page out")
    options = parser.parse_args()
    playwright = importlib.import_module("playwright.sync_api")
    chromium = os.environ.get("BLIP2_CHROMIUM") or shutil.which("chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if options.run:
            for scheme in ("light", "dark"):
                shoot_report(browser, options.run / "report.html", scheme)
        if not options.no_page:
            with serving() as address:
                for scheme in ("light", "dark"):
                    shoot_page(browser, address, scheme)
        browser.close()


def shoot_report(browser: Any, report: Path, scheme: str) -> None:
    """The curves of a report."""
    page = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme=scheme)
    page.goto(report.resolve().as_uri())
    save(page.locator("section", has_text="Curves").first.screenshot(), f"report-{scheme}.png")
    page.close()


def shoot_page(browser: Any, address: str, scheme: str) -> None:
    """An image with its caption, an answer and a heatmap."""
    page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.goto(address)
    page.set_input_files("input[type=file]", IMAGES / "camera.jpg")
    page.wait_for_selector("#captions li")
    page.fill("#question", "What is in the image?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#talk li")
    page.fill("#text", "a man with a camera")
    page.keyboard.press("Enter")
    page.wait_for_selector("#heatmap:visible")
    page.evaluate("scrollTo(0, 0)")
    save(page.screenshot(full_page=True), f"page-{scheme}.png")
    page.close()


def save(screenshot: bytes, name: str) -> None:
    """Fewer bytes: a page has few colours."""
    colours = Image.open(io.BytesIO(screenshot)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    colours.save(IMAGES / name, optimize=True)


@contextmanager
def serving() -> Iterator[str]:
    """The address of `blip2 serve`, once it answers."""
    server = subprocess.Popen([sys.executable, "-m", "blip2", "serve", "--model", "tiny", "--port", str(PORT)])
    address = f"http://127.0.0.1:{PORT}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/healthz", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
