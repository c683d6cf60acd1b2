"""What is in a data set, and every bad sample in it with its reason."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from blip2.data.collection import BadSample, BadSampleError, Collection, Sample, printable
from blip2.data.film import FRAMES, read_images
from blip2.data.sources import index
from blip2.errors import one_line

_LISTED = 20


@dataclass
class CheckReport:
    """Result of a check.

    Args:
        samples: usable ones.
        images: distinct image ids among them.
        sides: smallest, median and largest (width, height), by area.
        caption_words: mean length of a caption.
        duplicates: images whose bytes an earlier image has.
        note: on files that were not looked at.
    """

    name: str
    samples: int = 0
    images: int = 0
    captions: int = 0
    questions: int = 0
    caption_words: float = 0.0
    duplicates: int = 0
    note: str = ""
    sides: list[tuple[int, int]] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)

    def by_reason(self) -> dict[str, int]:
        """How many samples are bad for each reason, most first."""
        return dict(Counter(bad.reason for bad in self.bad).most_common())


def check_collection(spec: str, progress: bool = True) -> CheckReport:
    """Index a data set and decode every image of it.

    Raises:
        DataError: the data set itself cannot be found or read.
    """
    collection = index(spec)
    report = CheckReport(collection.name, bad=list(collection.bad), note=collection.note)
    sizes: list[tuple[int, int]] = []
    good: list[Sample] = []
    seen: set[bytes] = set()
    for sample, result in _decoded(collection, progress):
        if isinstance(result, str):
            report.bad.append(BadSample(sample.key, sample.path, result))
            continue
        size, digest = result
        report.duplicates += digest in seen
        seen.add(digest)
        sizes.append(size)
        good.append(sample)
    words = [len(caption.split()) for sample in good for caption in sample.captions]
    report.samples, report.captions = len(good), len(words)
    report.images = len({sample.image_id for sample in good})
    report.questions = sum(len(sample.questions) for sample in good)
    report.caption_words = statistics.fmean(words) if words else 0.0
    sizes.sort(key=lambda size: size[0] * size[1])
    report.sides = [sizes[0], sizes[len(sizes) // 2], sizes[-1]] if sizes else []
    return report


def decodable(collection: Collection, progress: bool = True) -> Collection:
    """The same data set with every image decoded once: those that cannot be are among its bad samples.

    What must know its samples before it begins (an evaluation) asks for this; others skip as they go. Weights of a
    mixture are left out.
    """
    good, bad = [], list(collection.bad)
    for sample, result in _decoded(collection, progress):
        if isinstance(result, str):
            bad.append(BadSample(sample.key, sample.path, result))
        else:
            good.append(sample)
    return Collection(collection.name, good, bad, note=collection.note)


def format_report(report: CheckReport) -> str:
    """The report for people; the first bad samples of every reason are named."""
    lines = [f"{report.name}: {report.samples} usable samples of {report.images} images, {report.captions} captions"]
    if report.captions:
        lines[0] += f" of {report.caption_words:.1f} words"
    if report.questions:
        lines.append(f"  {report.questions} with a question")
    if report.sides:
        small, middle, large = (f"{width}x{height}" for width, height in report.sides)
        lines.append(f"  image sizes: {small} smallest, {middle} median, {large} largest")
    if report.duplicates:
        lines.append(f"  {report.duplicates} images repeat the bytes of another")
    lines.append(f"  {len(report.bad)} bad samples" + (", skipped in training:" if report.bad else ""))
    for reason, count in report.by_reason().items():
        lines.append(f"  {count:>7}  {reason}")
        named = [bad for bad in report.bad if bad.reason == reason]
        lines += [f"             {one_line(bad.key)}  ({one_line(printable(bad.path))})" for bad in named[:_LISTED]]
        if count > _LISTED:
            lines.append(f"             and {count - _LISTED} more (--json lists all)")
    lines += [f"  {report.note}"] if report.note else []
    return "\n".join(lines)


def _decoded(collection: Collection, progress: bool) -> Iterator[tuple[Sample, str | tuple[tuple[int, int], bytes]]]:
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(_decode, collection.samples)
        pairs = zip(collection.samples, results, strict=True)
        yield from tqdm(pairs, total=len(collection.samples), unit="image", desc="checking", disable=not progress)


def _decode(sample: Sample) -> str | tuple[tuple[int, int], bytes]:
    """Size and digest of an image, or the reason why it is bad."""
    try:
        data = b"".join(sample.read_all())
        return read_images(sample, FRAMES)[0].size, hashlib.blake2b(data, digest_size=16).digest()
    except BadSampleError as error:
        return error.reason
