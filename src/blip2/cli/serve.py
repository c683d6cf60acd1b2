"""Command-line options of `blip2 serve`; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Parsers = argparse._SubParsersAction


def add_command(commands: Parsers[argparse.ArgumentParser], add_model: Callable[..., None]) -> None:
    """`blip2 serve`."""
    serve = commands.add_parser("serve", help="a page and an OpenAI-compatible API on this machine")
    serve.add_argument(
        "--model",
        action="append",
        help="run folder, preset, Hugging Face folder or hub id, or LAVIS .pth; several (--model A --model B) are "
        "shown side by side (default: the index's, else as elsewhere)",
    )
    serve.add_argument("--index", metavar="INDEX", help="of `blip2 index build`, to search in")
    serve.add_argument(
        "--host", default="127.0.0.1", help="others than this machine's own need --api-key (%(default)s)"
    )
    serve.add_argument("--port", type=int, default=8000, help="0 takes any free one (default: %(default)s)")
    serve.add_argument("--api-key", metavar="K", help="asked of every request (default: $BLIP2_API_KEY)")
    serve.add_argument(
        "--allow-url-hosts", nargs="+", default=[], metavar="H", help="fetch images from these hosts (default: none)"
    )
    serve.add_argument("--queue", type=int, default=64, help="requests that may wait (default: %(default)s)")
    serve.add_argument("--timeout", type=float, default=60.0, metavar="S", help="of a request (default: %(default)s)")
    serve.add_argument("--max-batch", type=int, default=16, help="requests that go together (default: %(default)s)")
    add_model(serve, named=False)
    serve.set_defaults(run=_run)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from blip2.server.command import serve_command

    return serve_command(options)
