"""The work of an evaluation: chunks in a fixed order, written as they are done, shared by processes.

Chunk c goes to process c mod world, and the same chunk is the same batch for any number of
processes: one process or eight give the same predictions. What is in a folder already is not done
again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blip2.errors import ConfigError, RunError, os_error_as
from blip2.io.atomic import write_json, write_json_lines
from blip2.ops import distributed

Entries = list[dict[str, Any]]

PREDICTIONS, SETTINGS = "predictions.jsonl", "settings.json"
# What only weighs predictions that are there: it may change, and nothing is predicted again.
WEIGHTS = ("itc_weight",)


class Folder:
    """Where an evaluation keeps its settings and predictions.

    Args:
        path: made when it is not there.
        settings: what can move the numbers; a folder with others, `WEIGHTS` aside, is refused.

    Raises:
        ConfigError: the folder is of an evaluation with other settings.
        RunError: it cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = path / SETTINGS
            if file.is_file():
                _require_same(json.loads(file.read_text("utf-8")), settings, path)
            if distributed.rank() == 0:
                write_json(file, settings)
        except ValueError as error:
            raise ConfigError(f"{path / SETTINGS}: not JSON: choose another --out") from error
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error
        distributed.barrier()

    def done(self) -> dict[str, dict[str, Any]]:
        """Predictions so far by id, of all processes; a line that was cut short is left out."""
        entries: dict[str, dict[str, Any]] = {}
        for file in sorted(self.path.glob("predictions*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    entries[entry["id"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue
        return entries

    def merged(self, order: Sequence[str]) -> Entries:
        """All predictions in the order of the data; the first process writes them to `predictions.jsonl`.

        Raises:
            RunError: one is missing.
        """
        distributed.barrier()
        done = self.done()
        missing = [name for name in order if name not in done]
        if missing:
            raise RunError(f"{self.path}: {len(missing)} predictions are missing, first {missing[0]}: run it again")
        entries = [done[name] for name in order]
        distributed.barrier()
        if distributed.rank() == 0:
            write_json_lines(self.path / PREDICTIONS, entries)
            for part in self.path.glob("predictions-*.jsonl"):
                part.unlink()
        return entries

    def append(self, entries: Entries) -> None:
        """Add predictions of this process to its file."""
        path = self.path / f"predictions-{distributed.rank()}.jsonl"
        with os_error_as(RunError, f"{path}: cannot be written"), path.open("a", encoding="utf-8") as handle:
            if handle.tell() and not _ends_in_newline(path):
                handle.write("\n")
            handle.write("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries))


def work_through(
    names: Sequence[str],
    folder: Folder,
    predict: Callable[[list[int]], Entries],
    *,
    batch: int,
    unit: str,
) -> Entries:
    """Predict what is not in the folder yet; returns all predictions in the order of `names`.

    Args:
        names: of the samples; a prediction's `id` is its sample's, with a number behind it where a name comes again.
        predict: takes positions in `names`, returns their entries without `id`.
        batch: samples per chunk.
        unit: on the progress bar.
    """
    names, done = _distinct(names), folder.done()
    mine = [c for n, c in enumerate(_chunks(len(names), batch)) if n % distributed.world_size() == distributed.rank()]
    todo = [c for c in mine if any(names[i] not in done for i in c)]
    total, left = sum(map(len, mine)), sum(map(len, todo))
    with tqdm(total=total, initial=total - left, unit=unit, disable=distributed.rank() > 0) as bar:
        for chunk in todo:
            entries = predict(chunk)
            folder.append([{"id": names[i], **entry} for i, entry in zip(chunk, entries, strict=True)])
            bar.update(len(chunk))
    return folder.merged(names)


def _chunks(count: int, size: int) -> Iterator[list[int]]:
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def _distinct(names: Sequence[str]) -> list[str]:
    counts: Counter[str] = Counter()
    distinct = []
    for name in names:
        counts[name] += 1
        distinct.append(name if counts[name] == 1 else f"{name}~{counts[name]}")
    return distinct


def _require_same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(now))
    for name in sorted((before.keys() | now.keys()).difference(WEIGHTS)):
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{path} is an evaluation with {name} = {before.get(name)!r}, not {now.get(name)!r}: "
                "choose another --out"
            )


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"
