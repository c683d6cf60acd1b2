"""`blip2 serve`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from blip2.cli.options import MODEL, Commands, add_loading
from blip2.errors import ConfigError, RunError

if TYPE_CHECKING:
    import socket

    from blip2.inference import Blip2
    from blip2.search.query import Index
    from blip2.search.store import Store
    from blip2.server.settings import Settings

# Module -> distribution.
_NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


def add_parser(commands: Commands) -> None:
    """`blip2 serve`."""
    serve = commands.add_parser("serve", help="a page and an OpenAI-compatible API on this machine")
    serve.add_argument(
        "--model",
        action="append",
        help=f"{MODEL}; several (--model A --model B) are shown side by side (default: the index's, else as elsewhere)",
    )
    serve.add_argument("--index", metavar="INDEX", help="of `blip2 index build`, to search in")
    serve.add_argument(
        "--host", default="127.0.0.1", help="others than this machine's own need --api-key (%(default)s)"
    )
    serve.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: %(default)s)")
    serve.add_argument("--api-key", metavar="K", help="required of every request (default: $BLIP2_API_KEY)")
    serve.add_argument(
        "--allow-url-hosts", nargs="+", default=[], metavar="H", help="fetch images from these hosts (default: none)"
    )
    serve.add_argument("--queue", type=int, default=64, help="requests that may wait (default: %(default)s)")
    serve.add_argument("--timeout", type=float, default=60.0, metavar="S", help="of a request (default: %(default)s)")
    serve.add_argument("--max-batch", type=int, default=16, help="requests that go together (default: %(default)s)")
    serve.add_argument(
        "--max-images", type=int, default=16, help="of a question, frames of films included (default: %(default)s)"
    )
    add_loading(serve)
    serve.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until stopped; what was taken is answered."""
    from blip2.server.settings import Settings

    settings = Settings(
        host=options.host,
        port=options.port,
        api_key=options.api_key or os.environ.get("BLIP2_API_KEY") or None,
        url_hosts=tuple(options.allow_url_hosts),
        queue=options.queue,
        timeout=options.timeout,
        max_batch=options.max_batch,
        max_images=options.max_images,
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
    import importlib.util

    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"blip2 serve needs {', '.join(missing)}: pip install 'blip2[serve]'")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before a model is loaded for minutes.

    Raises:
        RunError: the address is taken or not this machine's.
    """
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise RunError(f"cannot listen on {host}:{port}: {error.strerror}: choose another --port or --host") from error
    return listening


def model_name(source: str) -> str:
    """What clients call the model: a folder's or file's last name (no path of this machine), a hub id as it is."""
    path = Path(source)
    return (path.resolve().name or "blip2") if path.exists() else source


def model_names(sources: list[str]) -> list[str]:
    """What clients call several models: their last names, numbered where they are the same."""
    plain = [model_name(source) for source in sources]
    return [name if plain.count(name) == 1 else f"{name}-{plain[: n + 1].count(name)}" for n, name in enumerate(plain)]


def _indexes(store: Store | None, models: list[Blip2]) -> list[Index | None]:
    """For each model the index, at the first that it was built with.

    Raises:
        ConfigError: it was built with none of them.
    """
    if store is None:
        return [None] * len(models)
    from blip2.search.query import Index

    for n, model in enumerate(models):
        index = Index(store, model)
        try:
            index.model  # noqa: B018 - refuses another model than the index was built with
        except ConfigError:
            if n == len(models) - 1:
                raise
        else:
            break
    return [index if m == n else None for m in range(len(models))]


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
    models = [(name, model, index) for name, (model, _), index in zip(names, loaded, indexes, strict=True)]
    app = create_app(models, settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(settings.timeout) + 5,
        timeout_keep_alive=30,
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"blip2: {', '.join(names)} at http://{shown}:{port} (API at /docs); Ctrl-C stops", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises both signals anew once all is answered
        Server(config).run(sockets=[listening])
    print("blip2: stopped", flush=True)
    return 0
