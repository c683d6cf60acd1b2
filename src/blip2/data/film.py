"""Samples of several images, and films, which are drawn as a few frames spread evenly over them.

A GIF is read by Pillow, other films by PyAV (`pip install 'blip2[video]'`); a folder is a film of the images in it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.data.collection import BadSampleError, Sample
from blip2.data.image_files import images_below
from blip2.data.images import MAX_PIXELS, ImageLike, decode_image, open_image, to_rgb
from blip2.errors import DataError

# One image, a film, or several of them that belong together.
SampleLike = ImageLike | Sequence[ImageLike]
# Frames of a film where nothing else is said: as in transformers' InstructBlipVideo.
FRAMES = 4
# Films with more frames (20 minutes of 30 a second) are refused: all up to the last that is drawn are decoded.
MAX_FRAMES = 36_000
# ffmpeg's reader by the first bytes of a file: no other is used, since some open what a file names.
_FILMS = {rb".{4}ftyp": "mov", rb"\x1a\x45\xdf\xa3": "matroska", rb"RIFF.{4}AVI ": "avi"}
_GIF = b"GIF8"


def open_sample(sample: SampleLike, frames: int = FRAMES) -> list[Image.Image]:
    """The RGB images of one sample, in order.

    Args:
        sample: an image (path, bytes, Pillow), a film (path, bytes), a folder of frames, or a list of such.
        frames: images that each film is drawn as.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    if isinstance(sample, Image.Image):
        return [open_image(sample)]
    if not isinstance(sample, str | Path | bytes):
        images = [image for part in sample for image in open_sample(part, frames)]
        if not images:
            raise DataError("a sample without an image")
        return images
    if isinstance(sample, bytes):
        return _named("image", sample, frames)
    path = Path(sample)
    if path.is_dir():
        inside = images_below(path).paths
        if not inside:
            raise DataError(f"{path}: no image in this folder")
        return [open_image(inside[n]) for n in drawn(len(inside), frames)]
    try:
        return _named(str(path), path.read_bytes(), frames)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def decode_sample(data: bytes, frames: int = FRAMES) -> list[Image.Image]:
    """The RGB images of a file: one of an image, `frames` of a film or an animated GIF.

    Raises:
        BadSampleError: no image or film, damaged, or too large.
    """
    reader = film_reader(data)
    if reader is not None:
        return _film(data, reader, frames)
    if data.startswith(_GIF):
        return _gif(data, frames)
    return [decode_image(data)]


def read_images(sample: Sample, frames: int) -> list[Image.Image]:
    """The RGB images of a data set's sample: its image, its images, or `frames` of its film.

    Raises:
        DataError, BadSampleError: as `Sample.read` and `decode_sample`.
    """
    if sample.film:
        return decode_sample(sample.read(), frames)
    return [decode_image(data) for data in sample.read_all()]


def sample_source(sample: Sample, frames: int) -> SampleLike:
    """A data set's sample as a model takes it: the bytes of one image, or the images of a sample of several.

    Raises:
        DataError, BadSampleError: as `read_images`.
    """
    return read_images(sample, frames) if sample.several else sample.read()


def film_reader(data: bytes) -> str | None:
    """ffmpeg's reader of a film by its first bytes; None for anything else (GIFs too)."""
    return next((reader for start, reader in _FILMS.items() if re.match(start, data, re.DOTALL)), None)


def drawn(total: int, frames: int) -> list[int]:
    """`frames` positions spread evenly over `total`, repeated where there are fewer."""
    return [n * total // frames for n in range(frames)]


def _named(name: str, data: bytes, frames: int) -> list[Image.Image]:
    try:
        return decode_sample(data, frames)
    except BadSampleError as error:
        raise DataError(f"{name}: {error.reason}") from error


def _gif(data: bytes, frames: int) -> list[Image.Image]:
    first = decode_image(data)  # which says what is wrong with a file that is none
    try:
        with Image.open(io.BytesIO(data), formats=["GIF"]) as film:
            total = _counted(getattr(film, "n_frames", 1))
            if total == 1:
                return [first]
            images: list[Image.Image] = []
            for position in drawn(total, frames):
                film.seek(position)
                images.append(to_rgb(film.copy()))
            return images
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        raise BadSampleError("film is truncated or damaged") from error


def _film(data: bytes, reader: str, frames: int) -> list[Image.Image]:
    try:
        import av
    except ImportError:
        raise BadSampleError("films need PyAV: pip install 'blip2[video]'") from None
    try:
        with av.open(io.BytesIO(data), format=reader) as container:
            total = container.streams.video[0].frames
        images = _at(av, data, reader, drawn(_counted(total), frames)) if total else []
        if len(images) < frames:  # the file does not say how many there are, or says more than there are
            total = sum(1 for _ in _decoded(av, data, reader))
            images = _at(av, data, reader, drawn(_counted(total), frames)) if total else []
    except (av.FFmpegError, IndexError, ValueError, EOFError) as error:
        raise BadSampleError("film is truncated or damaged, or of a kind that cannot be decoded") from error
    if not images:
        raise BadSampleError("film has no frame that can be decoded")
    return images


def _at(av: Any, data: bytes, reader: str, positions: list[int]) -> list[Image.Image]:
    """Frames at ascending positions, with repeats; fewer where the film ends before."""
    images: list[Image.Image] = []
    for number, frame in enumerate(_decoded(av, data, reader)):
        if number in positions:
            images += [to_rgb(frame.to_image())] * positions.count(number)
        if number >= positions[-1]:
            break
    return images


def _decoded(av: Any, data: bytes, reader: str) -> Iterator[Any]:
    with av.open(io.BytesIO(data), format=reader) as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number >= MAX_FRAMES:
                raise BadSampleError(f"film has more than {MAX_FRAMES} frames")
            if frame.width * frame.height > MAX_PIXELS:
                raise BadSampleError(f"film has frames of {frame.width}x{frame.height} pixels")
            yield frame


def _counted(total: int) -> int:
    if total > MAX_FRAMES:
        raise BadSampleError(f"film has {total} frames, and at most {MAX_FRAMES} are read")
    return total
