"""`blip2 index build|add|remove|stat`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.cli.options import Commands, add_json, add_model
from blip2.errors import Blip2Error, ConfigError, DataError, one_line

if TYPE_CHECKING:
    from blip2.data.collection import Collection
    from blip2.inference import Blip2
    from blip2.search.segments import Row
    from blip2.search.store import Store

INDEX_MODEL = "the one that the index was built with"
_SHOWN = 5  # bad images named on the terminal


def add_parser(commands: Commands) -> None:
    """`blip2 index build|add|remove|stat`."""
    index = commands.add_parser("index", help="index images for search")
    actions = index.add_subparsers(dest="index_command", metavar="COMMAND", required=True)
    build = actions.add_parser("build", help="encode folders, shards or named sets into an index; run again to go on")
    build.add_argument("sources", nargs="+", metavar="FOLDER|SHARDS|IMAGE")
    build.add_argument("--out", required=True, metavar="INDEX", help="folder of the index")
    build.add_argument(
        "--captions",
        nargs="?",
        const="data",
        choices=("data", "model"),
        help="store captions: the data's own, the model's where there is none (`model`: always the model's)",
    )
    build.add_argument(
        "--engine",
        choices=("faiss", "exact", "lancedb"),  # lancedb of earlier versions means faiss
        metavar="{faiss,exact}",
        default="faiss",
        help="(default: faiss)",
    )
    build.add_argument("--exact-below", type=int, metavar="N", help="images up to which every vector is read (20000)")
    build.add_argument("--uri", help=argparse.SUPPRESS)  # of LanceDB's table, ignored
    add_model(build)
    add = actions.add_parser("add", help="add what is new, follow what has moved")
    add.add_argument("index", metavar="INDEX")
    add.add_argument("sources", nargs="+", metavar="FOLDER|SHARDS|IMAGE")
    add_model(add, INDEX_MODEL)
    remove = actions.add_parser("remove", help="take images out of an index; the files stay")
    remove.add_argument("index", metavar="INDEX")
    remove.add_argument("names", nargs="*", metavar="PATH|FOLDER|KEY")
    remove.add_argument("--gone", action="store_true", help="those whose file is not there any more")
    stat = actions.add_parser("stat", help="counts, sizes, model")
    stat.add_argument("index", metavar="INDEX")
    stat.add_argument("--check", action="store_true", help="read every vector; recall against exact search")
    for command, run in ((build, run_build), (add, run_add), (remove, run_remove), (stat, run_stat)):
        add_json(command)
        command.set_defaults(run=run)


def run_build(options: argparse.Namespace) -> int:
    """Make an index, or go on with one; exit code 2 when no image could be indexed."""
    from blip2.inference.loading import load_model
    from blip2.search.build import list_samples
    from blip2.search.engines import current_name
    from blip2.search.model_id import identify, require_same
    from blip2.search.store import Store

    data = list_samples(options.sources)
    exists = (Path(options.out) / "manifest.json").exists()
    if exists:
        _require_settings(Store(options.out), options)
    model, name = load_model(options)
    model_id = identify(model, _absolute(name))
    if exists:
        store = Store(options.out)
        require_same(store, model_id)
    else:
        settings = {} if options.exact_below is None else {"exact_below": options.exact_below}
        store = Store.create(options.out, model_id, current_name(options.engine), options.captions, **settings)
    return _fill(store, model, data, options)


def run_add(options: argparse.Namespace) -> int:
    """Add to an index, with the model that it was built with."""
    from blip2.search.build import list_samples
    from blip2.search.store import Store

    store = Store(options.index)
    data = list_samples(options.sources)
    return _fill(store, model_of(store, options), data, options)


def run_remove(options: argparse.Namespace) -> int:
    """Take images out of an index by path, folder or key, or those whose file is gone."""
    from blip2.search.build import exists
    from blip2.search.engines import Engine
    from blip2.search.store import Store

    store = Store(options.index)
    if not options.names and not options.gone:
        raise ConfigError("nothing to remove: name paths, folders or keys, or give --gone")
    with store.writing():
        paths = {name: os.path.abspath(name) for name in options.names}
        matched: set[str] = set()
        remove = []
        for image, row in store.items():
            names = [name for name, path in paths.items() if _is(row, name, path)]
            matched.update(names)
            if names or (options.gone and not exists(row)):
                remove.append(image)
        missing = [name for name in paths if name not in matched]
        if missing:
            raise DataError(f"{missing[0]}: not in {store.path}; nothing was removed")
        store.change(remove=remove)
        store.compact()
        Engine(store).update(store, progress=not options.json)
    _print({"removed": len(remove), "images": len(store)}, f"{len(remove)} removed, {len(store)} left", options)
    return 0


def run_stat(options: argparse.Namespace) -> int:
    """What an index holds; with --check exit code 1 where a segment is damaged."""
    from blip2.search.check import check, statistics
    from blip2.search.query import Index

    index = Index.open(options.index)
    state = statistics(index)
    if options.check:
        state["check"] = check(index)
    _print(state, "\n".join(_stat_lines(state)), options)
    return 1 if state.get("check", {}).get("damaged") else 0


def model_of(store: Store, options: argparse.Namespace) -> Blip2:
    """The model to embed with: --model, else the index's own.

    Raises:
        ConfigError: the index's own is not where it was, or --model is another.
    """
    from blip2.inference.loading import load_model
    from blip2.search.model_id import identify, require_same

    built_with, named = store.manifest.model, bool(options.model)
    options.model = options.model or built_with.name
    try:
        model, name = load_model(options)
    except Blip2Error as error:
        if named:
            raise
        raise ConfigError(
            f"{store.path}: the model that this index was built with, {built_with}, cannot be loaded ({error}): "
            "say where it is now with --model"
        ) from error
    require_same(store, identify(model, _absolute(name)))
    return model


def _require_settings(store: Store, options: argparse.Namespace) -> None:
    """An existing index goes on only as it was begun."""
    from blip2.search.engines import REPLACED

    manifest = store.manifest
    begun, given = (REPLACED.get(name, name) for name in (manifest.engine["name"], options.engine))
    if (manifest.captions, begun) != (options.captions, given):
        raise ConfigError(
            f"{store.path}: this index was begun with --engine {manifest.engine['name']} and "
            f"--captions {manifest.captions or 'none'}: go on with these, or choose another --out"
        )


def _fill(store: Store, model: Blip2, data: Collection, options: argparse.Namespace) -> int:
    from blip2.search.build import Builder

    report = Builder(store, model, progress=len(data.samples) > 1).add(data.samples)
    report.bad = [*data.bad, *report.bad]
    for image in report.bad[:_SHOWN]:
        print("blip2: " + one_line(f"{image.path}: {image.key}: {image.reason}"), file=sys.stderr)
    if len(report.bad) > _SHOWN:
        print(f"blip2: and {len(report.bad) - _SHOWN} more", file=sys.stderr)
    if data.note:
        print(data.note, file=sys.stderr)
    counts = asdict(report) | {"bad": len(report.bad), "images": len(store)}
    _print(counts, f"{report.line()}; {len(store)} images in {store.path}", options)
    return 0 if len(store) else 2


def _is(row: Row, name: str, path: str) -> bool:
    return row.key == name or row.path == path or row.path.startswith(path + os.sep)


def _absolute(name: str) -> str:
    """A model's name for later: a folder as its full path, a hub id as it is."""
    return os.path.abspath(name) if Path(name).exists() else name


def _print(value: dict[str, Any], line: str, options: argparse.Namespace) -> None:
    print(json.dumps(value) if options.json else line)


def _stat_lines(state: dict[str, Any]) -> list[str]:
    queries, width = state["vectors"]
    size = {name: f"{value / 2**20:.1f} MiB" for name, value in state["bytes"].items()}
    lines = [
        f"{state['images']} images, {state['captions']} captions, {state['gone']} gone",
        f"vectors {queries} x {width} in fp16, {state['segments']} segments, {size['segments']}",
        f"engine {state['engine']}: {state['approximate']} images approximate, the rest exact; {size['engine']}",
        f"model {state['model']}",
    ]
    if (checked := state.get("check")) is not None:
        damaged = checked["damaged"]
        lines.append(f"DAMAGED segments: {damaged}: build the index again" if damaged else "every vector is intact")
        if checked["recall"] is not None:
            lines.append(
                f"recall@{checked['depth']} against exact search {checked['recall']:.4f} over {checked['queries']} "
                f"{checked['kind']}; {checked['ms']} ms, exact {checked['exact_ms']} ms"
            )
    return lines
