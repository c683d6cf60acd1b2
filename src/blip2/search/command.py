"""`blip2 index build|add|remove|stat` and `blip2 search`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip2.data.collection import printable
from blip2.data.image_inputs import open_image
from blip2.errors import Blip2Error, ConfigError, DataError
from blip2.inference import Blip2
from blip2.inference.loading import load_model
from blip2.search import check
from blip2.search.build import Builder, Report, exists, list_samples
from blip2.search.engines import open_engine, require_engine
from blip2.search.model_id import identify, require_same
from blip2.search.query import Hit, Index
from blip2.search.report import write_page
from blip2.search.segments import Row
from blip2.search.store import Store

_SHOWN = 5  # bad images named on the terminal


def build_command(options: argparse.Namespace) -> int:
    """Make an index, or go on with one; exit code 2 when no image could be indexed."""
    require_engine(options.engine)
    samples, bad = list_samples(options.sources)
    there = (Path(options.out) / "manifest.json").exists()
    if there:
        _require_settings(Store(options.out), options)
    model, name = load_model(options)
    found = identify(model, _absolute(name))
    if there:
        store = Store(options.out)
        require_same(store, found)
    else:
        chosen = {"exact_below": options.exact_below, "uri": options.uri}
        settings = {name: value for name, value in chosen.items() if value is not None}
        store = Store.create(options.out, found, options.engine, options.captions, **settings)
    return _filled(store, model, samples, bad, options)


def add_command(options: argparse.Namespace) -> int:
    """Add to an index, with the model that it was built with."""
    store = Store(options.index)
    samples, bad = list_samples(options.sources)
    return _filled(store, _model_of(store, options), samples, bad, options)


def remove_command(options: argparse.Namespace) -> int:
    """Take images out of an index by path, folder or key, or those that are gone."""
    store = Store(options.index)
    if not options.names and not options.gone:
        raise ConfigError("nothing to remove: name paths, folders or keys, or give --gone")
    with store.writing():
        wanted = {name: os.path.abspath(name) for name in options.names}
        matched: set[str] = set()
        remove = []
        for image, row in store.items():
            names = [name for name, path in wanted.items() if _is(row, name, path)]
            matched.update(names)
            if names or (options.gone and not exists(row)):
                remove.append(image)
        missing = [name for name in wanted if name not in matched]
        if missing:
            raise DataError(f"{missing[0]}: not in {store.path}; nothing was removed")
        store.change(remove=remove)
        store.compact()
        open_engine(store).update(store, progress=not options.json)
    _say({"removed": len(remove), "images": len(store)}, f"{len(remove)} removed, {len(store)} left", options)
    return 0


def stat_command(options: argparse.Namespace) -> int:
    """What an index holds; with --check exit code 1 where a segment is damaged."""
    index = Index.open(options.index)
    found = check.statistics(index)
    if options.check:
        found["check"] = check.check(index)
    _say(found, "\n".join(_stat_lines(found)), options)
    return 1 if found.get("check", {}).get("damaged") else 0


def search_command(options: argparse.Namespace) -> int:
    """Find images; exit code 0 also where none is found."""
    store = Store(options.index)
    picture = open_image(options.image) if options.image else None
    if picture is None and not (options.text or "").strip():
        raise ConfigError("nothing to search for: give a text, --image PHOTO, or both")
    index = Index(store, _model_of(store, options))
    hits = index.search(
        options.text, picture, k=options.k, rerank=options.rerank, within=options.within, progress=sys.stderr.isatty()
    )
    if options.out:
        write_page(Path(options.out), hits, options.text, picture, f"{len(index)} images of {store.path.name}")
    for rank, hit in enumerate(hits, 1):
        print(json.dumps(as_dict(hit)) if options.json else _line(rank, hit))
    gone = sum(hit.state != "ok" for hit in hits)
    if gone:
        print(
            f"blip2: {gone} of {len(hits)} are gone or changed: `blip2 index add {store.path} FOLDER` follows files "
            "that moved, `index remove --gone` forgets them",
            file=sys.stderr,
        )
    return 0


def as_dict(hit: Hit) -> dict[str, Any]:
    """A hit as JSON holds it."""
    parts = {name: round(value, 5) for name, value in hit.parts.items()}
    entry = asdict(hit) | {"path": printable(hit.path), "score": round(hit.score, 5), "parts": parts}
    del entry["row"]
    return entry


def _model_of(store: Store, options: argparse.Namespace) -> Blip2:
    """The model to embed with: --model, else the index's own.

    Raises:
        ConfigError: the index's own is not where it was, or --model is another.
    """
    made, named = store.manifest.model, bool(options.model)
    options.model = options.model or made.name
    try:
        model, name = load_model(options)
    except Blip2Error as error:
        if named:
            raise
        raise ConfigError(
            f"{store.path}: the model that this index was built with, {made}, cannot be loaded ({error}): "
            "say where it is now with --model"
        ) from error
    require_same(store, identify(model, _absolute(name)))
    return model


def _require_settings(store: Store, options: argparse.Namespace) -> None:
    """An index that is there goes on only as it was begun."""
    manifest = store.manifest
    if (manifest.captions, manifest.engine["name"]) != (options.captions, options.engine):
        raise ConfigError(
            f"{store.path}: this index was begun with --engine {manifest.engine['name']} and "
            f"--captions {manifest.captions or 'none'}: go on with these, or choose another --out"
        )


def _filled(store: Store, model: Blip2, samples: list[Any], bad: list[Any], options: argparse.Namespace) -> int:
    report = Builder(store, model, progress=len(samples) > 1).add(samples)
    report.bad = [*bad, *report.bad]
    for line in [f"{b.path}: {b.key}: {b.reason}" for b in report.bad][:_SHOWN]:
        print(f"blip2: {line}", file=sys.stderr)
    if len(report.bad) > _SHOWN:
        print(f"blip2: and {len(report.bad) - _SHOWN} more", file=sys.stderr)
    _say(_counts(report) | {"images": len(store)}, f"{report.line()}; {len(store)} images in {store.path}", options)
    return 0 if len(store) else 2


def _counts(report: Report) -> dict[str, Any]:
    return asdict(report) | {"bad": len(report.bad)}


def _is(row: Row, name: str, path: str) -> bool:
    return row.key == name or row.path == path or row.path.startswith(path + os.sep)


def _absolute(name: str) -> str:
    """A model's name for later: a folder as its full path, a hub id as it is."""
    return os.path.abspath(name) if Path(name).exists() else name


def _say(value: dict[str, Any], line: str, options: argparse.Namespace) -> None:
    print(json.dumps(value) if options.json else line)


def _line(rank: int, hit: Hit) -> str:
    name = hit.path if hit.row.size < 0 else f"{hit.path}:{hit.key}"
    parts = " ".join(f"{part} {value:.3f}" for part, value in hit.parts.items())
    state = "" if hit.state == "ok" else f"  [{hit.state}]"
    caption = f"  {hit.caption}" if hit.caption else ""
    return printable(f"{rank:>3}  {hit.score:7.3f}  {name}  ({parts}){state}{caption}")


def _stat_lines(found: dict[str, Any]) -> list[str]:
    queries, width = found["vectors"]
    size = {name: f"{value / 2**20:.1f} MiB" for name, value in found["bytes"].items()}
    lines = [
        f"{found['images']} images, {found['captions']} captions, {found['gone']} gone",
        f"vectors {queries} x {width} in fp16, {found['segments']} segments, {size['segments']}",
        f"engine {found['engine']}: {found['approximate']} images approximate, the rest exact; {size['engine']}",
        f"model {found['model']}",
    ]
    if (checked := found.get("check")) is not None:
        damaged = checked["damaged"]
        lines.append(f"DAMAGED segments: {damaged}: build the index again" if damaged else "every vector is whole")
        if checked["recall"] is not None:
            lines.append(
                f"recall@{checked['depth']} against exact search {checked['recall']:.4f} over {checked['queries']} "
                f"{checked['kind']}; {checked['ms']} ms, exact {checked['exact_ms']} ms"
            )
    return lines
