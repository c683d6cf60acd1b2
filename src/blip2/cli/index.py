"""Command-line options of `blip2 index` and `blip2 search`; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Parsers = argparse._SubParsersAction
AddModel = Callable[[argparse.ArgumentParser], None]


def add_commands(commands: Parsers[argparse.ArgumentParser], add_model: AddModel) -> None:
    """`blip2 index build|add|remove|stat` and `blip2 search`."""
    index = commands.add_parser("index", help="index photographs for search")
    kinds = index.add_subparsers(dest="index_command", metavar="COMMAND", required=True)
    build = kinds.add_parser("build", help="encode folders, shards or named sets into an index; run again to go on")
    build.add_argument("sources", nargs="+", metavar="FOLDER|SHARDS|IMAGE")
    build.add_argument("--out", required=True, metavar="INDEX", help="folder of the index")
    build.add_argument(
        "--captions",
        nargs="?",
        const="data",
        choices=("data", "model"),
        help="store captions: the data's own, the model's where there is none (`model`: always the model's)",
    )
    build.add_argument("--engine", choices=("faiss", "exact", "lancedb"), default="faiss", help="(default: faiss)")
    build.add_argument("--exact-below", type=int, metavar="N", help="images up to which every vector is read (20000)")
    build.add_argument("--uri", help="of LanceDB's table, such as s3://bucket/path (default: inside the index)")
    add = kinds.add_parser("add", help="add what is new, follow what has moved")
    add.add_argument("index", metavar="INDEX")
    add.add_argument("sources", nargs="+", metavar="FOLDER|SHARDS|IMAGE")
    remove = kinds.add_parser("remove", help="take images out of an index; the files stay")
    remove.add_argument("index", metavar="INDEX")
    remove.add_argument("names", nargs="*", metavar="PATH|FOLDER|KEY")
    remove.add_argument("--gone", action="store_true", help="those whose file is not there any more")
    stat = kinds.add_parser("stat", help="counts, sizes, model")
    stat.add_argument("index", metavar="INDEX")
    stat.add_argument("--check", action="store_true", help="read every vector; recall against exact search")
    for command, name in ((build, "build"), (add, "add"), (remove, "remove"), (stat, "stat")):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        command.set_defaults(run=_run(f"{name}_command"))
    search = commands.add_parser("search", help="find photographs by text, by image, or both")
    search.add_argument("index", metavar="INDEX")
    search.add_argument("text", nargs="?", help='what to see: "two dogs in the snow"')
    search.add_argument("--image", metavar="PHOTO", help="find images like this one")
    search.add_argument("--k", type=int, default=20, help="images to find (default: %(default)s)")
    search.add_argument(
        "--rerank",
        type=int,
        metavar="N",
        help="best N re-ranked by ITM; 0 for none (default: 128, or 0 where the model never learned ITM)",
    )
    search.add_argument(
        "--in", dest="within", choices=("images", "captions", "both"), default="images", help="(default: images)"
    )
    search.add_argument("--json", action="store_true", help="one JSON object per image on stdout")
    search.add_argument("--out", metavar="FILE.html", help="a page with the pictures")
    search.set_defaults(run=_run("search_command"))
    for command in (build, add, search):
        add_model(command)
    for command in (add, search):
        for action in command._actions:
            if action.dest == "model":
                action.help = "default: the one that the index was built with"


def _run(name: str) -> Callable[[argparse.Namespace, list[str]], int]:
    def run(options: argparse.Namespace, rest: list[str]) -> int:
        from blip2.search import command

        return int(getattr(command, name)(options))

    return run
