"""Batches as a pure function of (seed, step): any number of processes or workers sees the same.

Step N takes the N-th slice of the epochs' permutations (of a mixture: of `mixture.epoch_order`).
The caption, the crop and the cached view of a sample are drawn from a generator seeded by (seed,
epoch, sample). Resuming needs the step alone, and a process takes its contiguous share of the
global batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip2.data.batch import Batch
from blip2.data.collection import BadSample, BadSampleError, Collection, Question, Sample
from blip2.data.feature_cache import FeatureCache
from blip2.data.film import read_images
from blip2.data.images import ImageSpec, augmented_view, decode_augmented, decode_image, plain_view
from blip2.data.mixture import epoch_order, epoch_size
from blip2.data.question_generation import questions_from
from blip2.data.tokenizers import clean_caption
from blip2.errors import DataError

# A caption, or an answer and its question.
Text = tuple[str, str | None]
_NEEDED = {"captions": "a caption", "questions": "a question and an answer", "both": "a caption"}
_QUESTIONS = 0.2  # share of questions where both are learned


@dataclass(frozen=True)
class TextSampler:
    """Draws the texts that are learned of an image.

    Args:
        texts: `captions`, `questions` with their answers, or `both`.
        per_image: texts drawn of each image.
        clean: captions through `clean_caption`.
    """

    texts: str = "captions"
    per_image: int = 1
    clean: bool = False

    def has_text(self, sample: Sample) -> bool:
        """Whether a sample has a text of the kind that is learned."""
        return bool(_answered(sample) if self.texts == "questions" else sample.captions)

    def draw(self, sample: Sample, rng: np.random.Generator) -> list[Text]:
        """Texts of a sample drawn at random: none twice before all were drawn."""
        if self.texts == "questions":
            questions = list(_answered(sample))
            drawn = (questions[n] for n in self._indices(len(questions), rng))
            return [(question.answers[int(rng.integers(len(question.answers)))], question.text) for question in drawn]
        captions = sample.captions or ("",)
        texts = [self.caption(captions[n]) for n in self._indices(len(captions), rng)]
        count = int(rng.binomial(len(texts), _QUESTIONS)) if self.texts == "both" else 0
        about = (_answered(sample) or questions_from(sample.captions)) if count else ()
        if about:
            order = rng.permutation(len(about))
            texts[:count] = [(about[n].answers[0], about[n].text) for n in np.resize(order, count)]
        return texts

    def caption(self, text: str) -> Text:
        """A caption as it is learned."""
        return clean_caption(text) if self.clean else text, None

    def _indices(self, count: int, rng: np.random.Generator) -> list[int]:
        if self.per_image == 1:
            return [int(rng.integers(count))]
        return [int(n) for n in np.resize(rng.permutation(count), self.per_image)]


@dataclass(frozen=True)
class _Item:
    """One drawn sample: its index, texts (captions, or questions with an answer) and view.

    Args:
        pixels: [3, S, S], or [I, 3, S, S] of several images.
    """

    index: int
    texts: list[Text]
    pixels: Tensor | None
    features: Tensor | None


class TrainingBatches(Dataset["Batch | DataError"]):
    """The endless stream of one process's training batches, from any step on; also batch N as a torch data set.

    Args:
        batch: samples of a step over all processes.
        spec: how images are prepared; may be None where `features` is given.
        features: cached features instead of images.
        augment, crop_min: random crops and flips of images.
        rank, world: this process and how many there are.
        workers: loader processes; 0 loads in this one.
        texts, texts_per_image, clean: see `TextSampler`.

    Raises:
        DataError: fewer usable samples than a batch, or a batch that `world` does not divide. While
            iterating: a shard is gone, or no image at all can be decoded.
    """

    def __init__(
        self,
        collection: Collection,
        *,
        batch: int,
        seed: int,
        spec: ImageSpec | None,
        features: FeatureCache | None = None,
        augment: bool = False,
        crop_min: float = 0.5,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        texts: str = "captions",
        texts_per_image: int = 1,
        clean: bool = False,
    ) -> None:
        if spec is None and features is None:
            raise ValueError("one of spec and features is needed")
        if batch % world:
            raise DataError(f"train.batch {batch} cannot be shared equally by {world} processes")
        self.collection, self.batch, self.seed, self.spec = collection, batch, seed, spec
        self.features, self.augment, self.crop_min = features, augment, crop_min
        self.rank, self.world, self.workers = rank, world, workers
        self.sampler = TextSampler(texts, texts_per_image, clean)
        self.bad: list[BadSample] = list(features.bad) if features is not None else []
        # What a feature cache could not encode, and what has no text (a bare image), is out; all else may be drawn.
        usable = []
        for index in features.usable if features is not None else range(len(collection.samples)):
            sample = collection.samples[index]
            if self.sampler.has_text(sample):
                usable.append(index)
            else:
                reason = "no question with an answer" if texts == "questions" else "no caption"
                self.bad.append(BadSample(sample.key, sample.path, reason))
        self.usable = np.array(usable, np.int64)
        self.image_numbers = _image_numbers(collection)
        ends = np.cumsum([size for size, _ in collection.mixture])
        self._weights = tuple(weight for _, weight in collection.mixture)
        # Which part of the mixture each usable sample belongs to.
        self._parts = np.searchsorted(ends, self.usable, side="right")
        places = epoch_size(self._parts, self._weights) if self._weights else len(usable)
        self.per_epoch = places // batch
        if self.per_epoch == 0:
            raise DataError(
                f"{collection.name}: {len(usable)} usable samples with {_NEEDED[texts]} are fewer than a "
                f"batch of {batch}: lower train.batch or give more data"
            )
        self._seen_bad: set[str] = set()
        self._order: tuple[int, np.ndarray, np.ndarray | None] | None = None

    def steps_from(self, step: int) -> Iterator[Batch]:
        """Batches of steps `step`, `step + 1`, ... without end."""
        for batch in self._loader(step) if self.workers else map(self.load, itertools.count(step)):
            known = {bad.key for bad in self.bad}
            batch.skipped = [bad for bad in batch.skipped if bad.key not in known]
            self.bad += batch.skipped
            yield batch

    def load(self, step: int) -> Batch:
        """The batch of a step, without what is not decoded before."""
        epoch, number = divmod(step, self.per_epoch)
        share = self.batch // self.world
        start = number * self.batch + self.rank * share
        places, turns = self._permutation(epoch)
        skipped: list[BadSample] = []
        items = [
            self._item(int(places[n]), epoch, skipped, () if turns is None else (int(turns[n]),))
            for n in range(start, start + share)
        ]
        fresh = [bad for bad in skipped if bad.key not in self._seen_bad]
        self._seen_bad |= {bad.key for bad in fresh}
        return _collate(self.collection, self.image_numbers, items, self.sampler.texts, fresh)

    def __getitem__(self, step: int) -> Batch | DataError:
        """As `load`, with errors as values: a loader process would wrap them in its own traceback."""
        try:
            return self.load(step)
        except DataError as error:
            return error

    def _loader(self, step: int) -> Iterator[Batch]:
        loader: DataLoader[Batch | DataError] = DataLoader(
            self,
            sampler=itertools.count(step),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=2,
            persistent_workers=True,
        )
        try:
            for batch in loader:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{self.collection.name}: a loader process was killed, most often for want of memory: "
                "lower data.workers (0 loads in the training process)"
            ) from error

    def _permutation(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Places of an epoch in order; in a mixture also which turn of its part each belongs to."""
        if self._order is None or self._order[0] != epoch:
            if self._weights:
                self._order = epoch, *epoch_order(self._parts, self._weights, self.seed, epoch)
            else:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.usable))
                self._order = epoch, order, None
        return self._order[1], self._order[2]

    def _pixels(self, sample: Sample, spec: ImageSpec, rng: np.random.Generator) -> Tensor:
        """Its image, or all its images by one crop and flip."""
        if not self.augment:
            return _plain_views(sample, spec)
        if not sample.several:
            return decode_augmented(sample.read(), spec, rng, self.crop_min)
        seed = int(rng.integers(1 << 62))
        images = read_images(sample, spec.frames)
        return torch.stack(
            [augmented_view(image, spec, np.random.default_rng(seed), self.crop_min) for image in images]
        )

    def _item(self, place: int, epoch: int, skipped: list[BadSample], turn: tuple[int, ...] = ()) -> _Item:
        """The sample at a place of the usable ones, or the next one that can be decoded.

        A mixture may have a sample several times in an epoch: its turn makes each another draw.
        """
        for offset in range(len(self.usable)):
            index = int(self.usable[(place + offset) % len(self.usable)])
            sample = self.collection.samples[index]
            rng = np.random.default_rng([self.seed, epoch, index, *turn])
            texts = self.sampler.draw(sample, rng)
            if self.features is not None:
                view = int(rng.integers(self.features.views))
                return _Item(index, texts, None, self.features.get([index], [view])[0])
            assert self.spec is not None
            try:
                return _Item(index, texts, self._pixels(sample, self.spec, rng), None)
            except BadSampleError as error:
                skipped.append(BadSample(sample.key, sample.path, error.reason))
        raise DataError(f"{self.collection.name}: not one image can be decoded; run `blip2 data check` on it")


def _plain_views(sample: Sample, spec: ImageSpec) -> Tensor:
    """Its images without augmentation."""
    if not sample.several:
        return plain_view(decode_image(sample.read()), spec)
    return torch.stack([plain_view(image, spec) for image in read_images(sample, spec.frames)])


def require_single_images(collection: Collection) -> None:
    """Refuse samples of several images or a film, of which stage 1 learns nothing and no cache holds the features.

    Raises:
        DataError: names the first.
    """
    several = next((sample for sample in collection.samples if sample.several), None)
    if several is not None:
        raise DataError(
            f"{collection.name}: {several.key} has several images or a film: they are for stage 2, with "
            "--data.cache_features false"
        )


def dev_batches(
    collection: Collection,
    *,
    batch: int,
    spec: ImageSpec | None,
    features: FeatureCache | None = None,
    texts: str = "captions",
    clean: bool = False,
) -> Iterator[Batch]:
    """All usable samples in order, plain views, always the same text of each; what cannot be decoded is left out.

    The text is the first caption; of questions, which data sets list by kind, one by the seed 0.
    """
    sampler, numbers = TextSampler(texts, clean=clean), _image_numbers(collection)
    items: list[_Item] = []
    for index in features.usable if features is not None else range(len(collection.samples)):
        sample = collection.samples[index]
        if texts == "questions":
            if not sampler.has_text(sample):
                continue
            drawn = sampler.draw(sample, np.random.default_rng([0, index]))
        else:
            drawn = [sampler.caption(next(iter(sample.captions), ""))]
        if features is not None:
            items.append(_Item(index, drawn, None, features.get([index], [0])[0]))
        else:
            assert spec is not None
            with suppress(BadSampleError):
                items.append(_Item(index, drawn, _plain_views(sample, spec), None))
        if len(items) == batch:
            yield _collate(collection, numbers, items, texts)
            items = []
    if items:
        yield _collate(collection, numbers, items, texts)


def _collate(
    collection: Collection, image_numbers: list[int], items: list[_Item], texts: str, skipped: Sequence[BadSample] = ()
) -> Batch:
    pixels = [item.pixels if item.pixels.ndim == 4 else item.pixels[None] for item in items if item.pixels is not None]
    several = any(len(views) > 1 for views in pixels)
    features = [item.features for item in items if item.features is not None]
    pairs = [text for nth in zip(*(item.texts for item in items), strict=True) for text in nth]
    return Batch(
        [collection.samples[item.index].key for item in items],
        torch.tensor([image_numbers[item.index] for item in items]),
        [caption for caption, _ in pairs],
        torch.cat(pixels) if pixels else None,
        torch.stack(features) if features else None,
        list(skipped),
        [question or "" for _, question in pairs] if texts != "captions" else None,
        [len(views) for views in pixels] if several else None,
    )


def _image_numbers(collection: Collection) -> list[int]:
    """A number for the image of each sample: equal where the image id is."""
    numbers = {name: n for n, name in enumerate(dict.fromkeys(sample.image_id for sample in collection.samples))}
    return [numbers[sample.image_id] for sample in collection.samples]


def _answered(sample: Sample) -> tuple[Question, ...]:
    return tuple(question for question in sample.questions if question.answers)
