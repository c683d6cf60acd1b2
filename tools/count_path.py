"""How many files and functions of the package a piece of work runs through: what a stranger reads to follow it.

    python -m tools.count_path [train] [step] [caption] [search] [chat] [--names]

Random models of a few thousand weights and pictures made here; `train` is from the command to the end of its first
step, `step` the step alone, `chat` one request to `/v1/chat/completions`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "blip2"
sys.path[:0] = [str(ROOT), str(PACKAGE.parent)]


class Counter:
    """Functions of the package that are called while it is on, in every thread."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def __enter__(self) -> Counter:
        threading.setprofile(self._call)
        sys.setprofile(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _call(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # bodies of modules and classes are no functions, comprehensions belong to theirs
        function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
        if event == "call" and function and code.co_filename.startswith(str(PACKAGE)):
            self.seen.add((str(Path(code.co_filename).relative_to(PACKAGE)), code.co_qualname))

    def told(self, names: bool) -> str:
        files = sorted({file for file, _ in self.seen})
        line = f"{len(self.seen)} functions in {len(files)} files"
        return line + "".join(f"\n    {file}" for file in files) if names else line


def pictures(folder: Path) -> Path:
    """Eight pictures of noise with a caption beside each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (48, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("two cats on the grass\n")
    return folder


def train(folder: Path, itm: Path, counter: Counter, *, only_step: bool) -> None:
    """`blip2 train tiny/stage1` for one step, without dev data."""
    from blip2.cli.main import main
    from blip2.training.trainer import Trainer

    towers = ["--vision.name", itm, "--vision.image_size", 56, "--vision.pool", 1, "--qformer.init", itm]
    loop = ["--qformer.queries", 5, "--qformer.embed_dim", 16, "--data.dev", "null", "--data.workers", 0, "--steps", 1]
    start = ["--init", folder / "ours", "--out", folder / f"run{only_step}", "--data", folder / "pictures"]
    given = ["train", "tiny/stage1", *start, *towers, *loop, "--batch", 4, "--optim.warmup", 0]
    step: Callable[..., Any] = Trainer._one_step

    def counted(*arguments: Any) -> Any:
        with counter:
            return step(*arguments)  # what comes after it is not counted

    Trainer._one_step = counted  # type: ignore[assignment, method-assign]
    try:
        with contextlib.nullcontext() if only_step else counter:
            main(list(map(str, given)))
    finally:
        Trainer._one_step = step  # type: ignore[method-assign]


def chat(folder: Path, opt: Path, counter: Counter) -> None:
    """One question with an image, through the application."""
    import base64

    from fastapi.testclient import TestClient

    import blip2
    from blip2.server.app import create_app
    from blip2.server.settings import Settings

    data = base64.b64encode((folder / "pictures/0.png").read_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    body = {"model": "x", "messages": [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}]}
    model = blip2.load(opt, device="cpu")
    with counter:  # threads are watched from their start only
        app = create_app([("x", model, None)], Settings())
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            counter.seen.clear()
            client.post("/v1/chat/completions", json=body).raise_for_status()
            asked = set(counter.seen)
    counter.seen = asked


def search(folder: Path, itm: Path, counter: Counter) -> None:
    """`blip2 search`, the index built before."""
    from blip2.cli.main import main

    main(["index", "build", str(folder / "pictures"), "--out", str(folder / "i"), "--model", str(itm)])
    with counter:
        main(["search", str(folder / "i"), "two cats", "--model", str(itm)])


def main() -> None:
    """Print a line for each piece of work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", nargs="*", help="train, step, caption, search, chat (default: all)")
    parser.add_argument("--names", action="store_true", help="list the files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for work in options.work or ["train", "step", "caption", "search", "chat"]:
            counter = Counter()
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                run(work, folder, counter)
            print(f"{work:<8} {counter.told(options.names)}", flush=True)


def run(work: str, folder: Path, counter: Counter) -> None:
    """A piece of work; models and pictures are made when first needed."""
    from tests import tiny_models

    import blip2

    if not (folder / "pictures").exists():
        pictures(folder / "pictures")
        for kind in ("itm", "opt"):
            tiny_models.save(kind, folder / kind)
        blip2.convert(folder / "itm", folder / "ours", "blip2")
    if work in ("train", "step"):
        train(folder, folder / "itm", counter, only_step=work == "step")
    elif work == "caption":
        with counter:
            blip2.load(folder / "opt", device="cpu").caption(str(folder / "pictures/0.png"), beams=1)
    elif work == "search":
        search(folder, folder / "itm", counter)
    else:
        chat(folder, folder / "opt", counter)


if __name__ == "__main__":
    main()
