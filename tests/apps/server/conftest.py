"""Servers over tiny random models: in the test's own thread, or of uvicorn on a free port."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blip2
from blip2.inference import Blip2

pytest.importorskip("fastapi", reason="blip2 serve needs the extra `serve`")
pytest.importorskip("httpx", reason="the tests of the server need httpx")


def picture(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Noise, smooth enough for JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def encoded(kind: str = "JPEG", seed: int = 0, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="session")
def both(tiny: Path, tiny_opt: Path) -> Blip2:
    """A stage 2 and a stage 1 in one."""
    first, second = blip2.load(tiny, device="cpu"), blip2.load(tiny_opt, device="cpu")
    model = Blip2(second.config, stage1=first.stage1, stage2=second.stage2)
    model.text_tokenizer = first.text_tokenizer
    return model


@pytest.fixture(scope="session")
def stage1_only(tiny: Path) -> Blip2:
    return blip2.load(tiny, device="cpu")


@pytest.fixture
def serve(both: Blip2) -> Iterator[Callable[..., Any]]:
    """`serve(queue=2)` is a client of an application with these settings."""
    from fastapi.testclient import TestClient

    from blip2.apps.server.app import create_app
    from blip2.apps.server.settings import Settings

    opened = []

    def client(*, model: Blip2 | None = None, index: Any = None, **settings: Any) -> TestClient:
        app = create_app(model or both, Settings(**settings), name="tiny", index=index)
        found = TestClient(app, base_url="http://127.0.0.1:8000")
        found.__enter__()
        opened.append(found)
        return found

    yield client
    for each in opened:
        each.__exit__(None, None, None)


@contextmanager
def listening(app: Any) -> Iterator[tuple[str, Any]]:
    """uvicorn in a thread: its address and the server, whose `should_exit` ends it."""
    import uvicorn

    found = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [found]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{found.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(60)
        found.close()
