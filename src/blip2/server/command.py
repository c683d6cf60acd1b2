"""`blip2 serve`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from blip2.errors import ConfigError, RunError
from blip2.server.settings import Settings

if TYPE_CHECKING:
    from blip2.inference import Blip2
    from blip2.search.query import Index
    from blip2.search.store import Store

_NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


def serve_command(options: argparse.Namespace) -> int:
    """Serve until stopped; what was taken is answered."""
    settings = Settings(
        host=options.host,
        port=options.port,
        api_key=options.api_key or os.environ.get("BLIP2_API_KEY") or None,
        url_hosts=tuple(options.allow_url_hosts),
        queue=options.queue,
        timeout=options.timeout,
        max_batch=options.max_batch,
    )
    require_packages()
    listening = listen(settings.host, settings.port)
    try:
        return _serve(options, settings, listening)
    finally:
        listening.close()


def require_packages() -> None:
    """
    Raises:
        ConfigError: names what is missing and the command that adds it.
    """
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"blip2 serve needs {', '.join(missing)}: pip install 'blip2[serve]'")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before a model is loaded for minutes.

    Raises:
        RunError: the address is taken or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise RunError(f"cannot listen on {host}:{port}: {error.strerror}: choose another --port or --host") from error
    return found


def model_name(source: str) -> str:
    """What clients call the model: a folder's or file's last name (no path of this machine), a hub id as it is."""
    path = Path(source)
    return (path.resolve().name or "blip2") if path.exists() else source


def model_names(sources: list[str]) -> list[str]:
    """What clients call several models: their last names, numbered where they are the same."""
    plain = [model_name(source) for source in sources]
    return [name if plain.count(name) == 1 else f"{name}-{plain[: n + 1].count(name)}" for n, name in enumerate(plain)]


def _indexes(store: Store | None, models: list[Blip2]) -> list[Index | None]:
    """The index at the first model that it was built with.

    Raises:
        ConfigError: it was built with none of them.
    """
    found: list[Index | None] = [None] * len(models)
    if store is None:
        return found
    from blip2.search.query import Index

    for n, model in enumerate(models):
        index = Index(store, model)
        try:
            index.model  # noqa: B018 - refuses another model than the index was built with
        except ConfigError:
            if n == len(models) - 1:
                raise
            continue
        found[n] = index
        break
    return found


def _serve(options: argparse.Namespace, settings: Settings, listening: socket.socket) -> int:
    import uvicorn

    from blip2.inference.loading import load_model
    from blip2.search.store import Store
    from blip2.server.app import create_app

    store = Store(options.index) if options.index else None
    named = options.model or [None if store is None else store.manifest.model.name]
    loaded = [load_model(argparse.Namespace(**{**vars(options), "model": name})) for name in named]
    names = model_names([name for _, name in loaded])
    indexes = _indexes(store, [model for model, _ in loaded])
    (name, model, index), *others = [
        (name, model, index) for name, (model, _), index in zip(names, loaded, indexes, strict=True)
    ]
    app = create_app(model, settings, name=name, index=index, others=others)
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(settings.timeout) + 5,
        timeout_keep_alive=30,
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"blip2: {', '.join(names)} at http://{shown}:{port} (API at /docs); Ctrl-C stops", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it anew once all is answered
        uvicorn.Server(config).run(sockets=[listening])
    print("blip2: stopped", flush=True)
    return 0
