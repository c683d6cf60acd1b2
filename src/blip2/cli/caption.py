"""`blip2 caption` and `blip2 ask`: folder runs are batched, resumable and skip what is done."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from blip2.configs import DecodingConfig
from blip2.data.collection import printable
from blip2.data.few_shot import read_shots
from blip2.data.folders import find_images
from blip2.data.image_inputs import open_image
from blip2.errors import DataError, RunError, os_error_as
from blip2.inference.few_shot import Examples
from blip2.inference.loading import load_model
from blip2.io.atomic import write_bytes, write_text

_START = b'{"image": "'  # of every line of a captions file


def caption_command(options: argparse.Namespace) -> int:
    """Caption what was named; exit code 2 when a named image failed or none could be captioned."""
    decoding = DecodingConfig(
        beams=options.beams,
        num=options.num,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        repetition_penalty=options.repetition_penalty,
        sample=options.sample,
        top_p=options.top_p,
        rerank=options.rerank,
    )
    paths = find_images(options.images)
    todo = _not_done(paths, options)
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {len(paths)} images are done already", file=sys.stderr)
    if not todo:
        return 0
    shots = read_shots(options.shots) if options.shots else []
    model, _ = load_model(options)
    examples = Examples(model, shots) if shots else ()
    sink = _open_sink(options)
    failed: list[str] = []
    with tqdm(total=len(todo), unit="image", desc="captioning", disable=len(todo) < 2) as bar:
        for names, pictures in _batches(todo, options.batch, failed):
            chosen = {"prompt": options.prompt, "decoding": decoding, "shots": examples}
            found = model.caption(pictures, **chosen) if pictures else []
            for name, captions in zip(names, found, strict=True):
                sink(name, captions if isinstance(captions, list) else [captions])
            bar.update(len(names))
            bar.set_postfix(failed=len(failed), refresh=False)
    for line in failed:
        tqdm.write(f"blip2: {line}", file=sys.stderr)
    named = [line for line in failed if any(line.startswith(f"{n}: ") for n in options.images)]
    return 2 if named or len(failed) == len(todo) else 0


def ask_command(options: argparse.Namespace) -> int:
    """Answer one question about one image."""
    picture = open_image(options.image)
    shots = read_shots(options.shots) if options.shots else []
    answer = load_model(options)[0].ask([picture], [options.question], beams=options.beams, shots=shots)[0]
    if options.json:
        print(json.dumps({"image": options.image, "question": options.question, "answer": answer}))
    else:
        print(answer)
    return 0


def _batches(paths: list[str], size: int, failed: list[str]) -> Iterator[tuple[list[str], list[Image.Image]]]:
    names: list[str] = []
    pictures: list[Image.Image] = []
    for path in paths:
        try:
            picture = open_image(path)
        except DataError as error:
            failed.append(str(error))
            continue
        names.append(path)
        pictures.append(picture)
        if len(names) == max(1, size):
            yield names, pictures
            names, pictures = [], []
    if names:
        yield names, pictures


def _not_done(paths: list[str], options: argparse.Namespace) -> list[str]:
    if options.sidecar:
        return [p for p in paths if not Path(p).with_suffix(".txt").exists()]
    if not options.out:
        return paths
    target = Path(options.out)
    done = {entry["image"] for entry in _whole_lines(target)} if target.exists() else set()
    return [p for p in paths if printable(p) not in done]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a captions file; a last line cut short by a kill is dropped from it.

    Raises:
        DataError: it cannot be read, or a line is not one of ours; the file is left as it is.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
        entries = [_entry(path, number, line) for number, line in enumerate(lines, 1)]
        if rest:
            if not rest.startswith(_START[: len(rest)]):
                raise _not_ours(path, len(lines) + 1)
            write_bytes(path, b"".join(line + b"\n" for line in lines))
    except OSError as error:
        raise DataError(f"{path}: cannot be read and continued: {error.strerror}") from error
    return entries


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(line)
        entry["image"], entry["captions"]
    except (ValueError, KeyError, TypeError):
        raise _not_ours(path, number) from None
    return entry


def _not_ours(path: Path, number: int) -> DataError:
    return DataError(f"{path}: line {number} is not a caption line; choose another --out")


def _open_sink(options: argparse.Namespace) -> Any:
    """A function (image, captions) that puts captions where the options say."""
    if options.sidecar:
        return _write_sidecar
    if options.out:
        return lambda image, captions: _append(Path(options.out), image, captions)
    if options.json:
        return lambda image, captions: print(_line(image, captions), flush=True)
    return lambda image, captions: print(*(f"{printable(image)}: {text}" for text in captions), sep="\n", flush=True)


def _line(image: str, captions: list[str]) -> str:
    return json.dumps({"image": printable(image), "captions": captions}, ensure_ascii=False)


def _append(path: Path, image: str, captions: list[str]) -> None:
    with os_error_as(RunError, f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(_line(image, captions) + "\n")


def _write_sidecar(image: str, captions: list[str]) -> None:
    target = Path(image).with_suffix(".txt")
    with os_error_as(RunError, f"{target}: cannot be written"):
        write_text(target, "".join(f"{text}\n" for text in captions))
