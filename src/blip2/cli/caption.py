"""`blip2 caption IMAGE|FOLDER ...`: batched and resumable; what is done already is skipped."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2.cli.options import Commands, add_beams, add_frames, add_json, add_model, add_shots
from blip2.errors import DataError, RunError, one_line, os_error_as

if TYPE_CHECKING:
    from PIL import Image

    from blip2.configs import DecodingConfig

_START = b'{"image": "'  # of every line of a captions file


def add_parser(commands: Commands) -> None:
    """`blip2 caption`."""
    caption = commands.add_parser("caption", help="caption images, films or folders of images")
    caption.add_argument("images", nargs="+", metavar="IMAGE|FILM|FOLDER")
    caption.add_argument("--together", action="store_true", help="one caption of all that is named, in its order")
    add_frames(caption)
    caption.add_argument("--prompt", help="text that the caption continues (default: the run's)")
    caption.add_argument("--num", type=int, default=1, help="captions per image (default: %(default)s)")
    caption.add_argument("--min-tokens", type=int, default=8, help="of a caption (default: %(default)s)")
    caption.add_argument("--max-tokens", type=int, default=30, help="of a caption (default: %(default)s)")
    caption.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is none (default: %(default)s)")
    caption.add_argument("--sample", action="store_true", help="nucleus sampling instead of beam search")
    caption.add_argument("--top-p", type=float, default=0.9, help="of the sampling (default: %(default)s)")
    caption.add_argument("--rerank", type=int, default=0, metavar="N", help="of N captions the most similar by ITC")
    output = caption.add_mutually_exclusive_group()
    add_json(output, "one JSON object per image")
    output.add_argument("--out", metavar="FILE.jsonl", help="append to a file; images already in it are skipped")
    output.add_argument("--sidecar", action="store_true", help="write a text file beside each image that has none")
    add_beams(caption)
    add_shots(caption)
    add_model(caption)
    caption.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Caption what was named; exit code 2 when a named image failed or none could be captioned."""
    from tqdm import tqdm

    from blip2.configs import DecodingConfig
    from blip2.data.few_shot import read_shots
    from blip2.data.image_files import find_images

    fields = ("beams", "num", "min_tokens", "max_tokens", "repetition_penalty", "sample", "top_p", "rerank")
    decoding = DecodingConfig(**{name: getattr(options, name) for name in fields})
    if options.together:
        return _caption_together(options, decoding)
    files = find_images(options.images)
    paths = [str(path) for path in files.paths]
    todo = not_done(paths, options)
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {len(paths)} images are done already", file=sys.stderr)
    if not todo:
        _say(files.note())
        return 0
    shots = read_shots(options.shots) if options.shots else []
    from blip2.inference.few_shot import Examples
    from blip2.inference.loading import load_model

    model, _ = load_model(options)
    model.frames = options.frames or model.frames
    examples = Examples(model, shots) if shots else ()
    failed: list[str] = []
    with tqdm(total=len(todo), unit="image", desc="captioning", disable=len(todo) < 2) as bar:
        for names, images in batches(todo, options.batch, model.frames, failed):
            answers = model.caption(images, prompt=options.prompt, decoding=decoding, shots=examples) if images else []
            for name, captions in zip(names, answers, strict=True):
                write_captions(name, captions if isinstance(captions, list) else [captions], options)
            bar.update(len(names))
            bar.set_postfix(failed=len(failed), refresh=False)
    for line in failed:
        tqdm.write(f"blip2: {one_line(line)}", file=sys.stderr)
    _say(files.note())
    named = [line for line in failed if any(line.startswith(f"{n}: ") for n in options.images)]
    return 2 if named or len(failed) == len(todo) else 0


def _say(note: str) -> None:
    if note:
        print(note, file=sys.stderr)


def _caption_together(options: argparse.Namespace, decoding: DecodingConfig) -> int:
    """One caption of several images, films and folders of frames."""
    from blip2.data.few_shot import read_shots
    from blip2.data.film import FRAMES, open_sample
    from blip2.errors import ConfigError
    from blip2.inference.loading import load_model

    if options.out or options.sidecar:
        raise ConfigError("--together prints one caption: leave out --out and --sidecar")
    open_sample(options.images, options.frames or FRAMES)
    shots = read_shots(options.shots) if options.shots else []
    model, _ = load_model(options)
    model.frames = options.frames or model.frames
    captions = model.caption([options.images], prompt=options.prompt, decoding=decoding, shots=shots)[0]
    write_captions(", ".join(options.images), captions if isinstance(captions, list) else [captions], options)
    return 0


def batches(
    paths: list[str], size: int, frames: int, failed: list[str]
) -> Iterator[tuple[list[str], list[list[Image.Image]]]]:
    """Paths and their images (of a film several), `size` at a time; what cannot be read adds a line to `failed`."""
    from blip2.data.film import open_sample

    names: list[str] = []
    images: list[list[Image.Image]] = []
    for path in paths:
        try:
            images.append(open_sample(path, frames))
        except DataError as error:
            failed.append(str(error))
            continue
        names.append(path)
        if len(names) == max(1, size):
            yield names, images
            names, images = [], []
    if names:
        yield names, images


def not_done(paths: list[str], options: argparse.Namespace) -> list[str]:
    """Images without captions where the options write them."""
    from blip2.data.collection import printable
    from blip2.data.image_files import text_to_write

    if options.sidecar:
        return [p for p in paths if _blank(text_to_write(Path(p)))]
    if not options.out or not Path(options.out).exists():
        return paths
    done = {entry["image"] for entry in _complete_lines(Path(options.out))}
    return [p for p in paths if printable(p) not in done]


def _blank(path: Path) -> bool:
    """Whether a text file is not there, or has nothing but blanks in it."""
    try:
        return not path.read_bytes().strip()
    except OSError:
        return True


def write_captions(image: str, captions: list[str], options: argparse.Namespace) -> None:
    """Write or print the captions of an image as the options say.

    Raises:
        RunError: the file cannot be written.
    """
    from blip2.data.collection import printable
    from blip2.data.image_files import text_to_write
    from blip2.io.atomic import write_text

    line = json.dumps({"image": printable(image), "captions": captions}, ensure_ascii=False)
    if not (options.sidecar or options.out):
        lines = [line] if options.json else [f"{printable(image)}: {text}" for text in captions]
        print(*lines, sep="\n", flush=True)
        return
    target = text_to_write(Path(image)) if options.sidecar else Path(options.out)
    with os_error_as(RunError, f"{target}: cannot be written"):
        if options.sidecar:
            write_text(target, "".join(f"{text}\n" for text in captions))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a captions file; a last line cut short by a kill is dropped from it.

    Raises:
        DataError: it cannot be read, or a line is not one of ours; the file is left as it is.
    """
    from blip2.io.atomic import write_bytes

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
