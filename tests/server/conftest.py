"""Servers over tiny random models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2
from blip2.inference import Blip2


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    pytest.importorskip("fastapi", reason="blip2 serve needs the extra `serve`")
    pytest.importorskip("httpx", reason="the tests of the server need httpx")


@pytest.fixture(scope="session")
def mutations() -> Callable[[bytes, int], list[bytes]]:
    """`mutations(picture, seed)`: random bytes of it changed, cut out, doubled, and set."""

    def four(whole: bytes, seed: int) -> list[bytes]:
        rng = np.random.default_rng(seed)
        mutated = []
        for how in range(4):
            data = bytearray(whole)
            at, size = int(rng.integers(0, len(data))), int(rng.integers(1, 40))
            if how == 0:
                for place in rng.integers(0, len(data), size):
                    data[place] = int(rng.integers(0, 256))
            elif how == 1:
                del data[at : at + size]
            elif how == 2:
                data[at:at] = data[at : at + size]
            else:
                data[at : at + 4] = b"\xff\xff\xff\xff"
            mutated.append(bytes(data))
        return mutated

    return four


@pytest.fixture(scope="session")
def both(tiny: Path, tiny_opt: Path) -> Blip2:
    """A stage 2 and a stage 1 in one, in float32: what a batch answers equals what one image alone does."""
    first, second = (blip2.load(folder, device="cpu", dtype="fp32") for folder in (tiny, tiny_opt))
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

    from blip2.server.app import create_app
    from blip2.server.settings import Settings

    opened = []

    def client(*, model: Blip2 | None = None, index: Any = None, others: Any = (), **settings: Any) -> TestClient:
        app = create_app([("tiny", model or both, index), *others], Settings(**settings))
        http = TestClient(app, base_url="http://127.0.0.1:8000")
        http.__enter__()
        opened.append(http)
        return http

    yield client
    for each in opened:
        each.__exit__(None, None, None)


@contextmanager
def _listening(model: Blip2, *, index: Any = None, others: Any = (), **settings: Any) -> Iterator[tuple[str, Any, Any]]:
    """uvicorn in a thread on a free port: its address, the uvicorn server and the application."""
    import uvicorn

    from blip2.cli.serve import listen
    from blip2.server.app import create_app
    from blip2.server.settings import Settings

    app = create_app([("tiny", model, index), *others], Settings(**settings))
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", server, app
    finally:
        server.should_exit = True
        thread.join(60)
        bound.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def listening() -> Callable[..., AbstractContextManager[tuple[str, Any, Any]]]:
    """`with listening(model, queue=2) as (address, server, app)`: a real server of these settings."""
    return _listening
