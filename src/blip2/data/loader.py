"""Batches as a pure function of (seed, step): any number of processes or workers sees the same.

Step N takes the N-th slice of the epochs' permutations (of a mixture: of `mixture.epoch_order`).
The caption, the crop and the cached view of a sample are drawn from a generator seeded by (seed,
epoch, sample). Resuming needs the step alone, and a process takes its contiguous share of the
global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip2.data.batch import Batch
from blip2.data.collection import BadSample, BadSampleError, Collection, Question, Sample
from blip2.data.feature_cache import FeatureCache
from blip2.data.images import ImageSpec, decode_augmented, decode_image, plain_view
from blip2.data.mixture import epoch_order, epoch_size
from blip2.data.question_generation import questions_from
from blip2.data.tokenizers import clean_caption
from blip2.errors import DataError

# A caption, or an answer and its question.
Text = tuple[str, str | None]
_WANTED = {"captions": "a caption", "questions": "a question and an answer", "both": "a caption"}
_QUESTIONS = 0.2  # share of questions where both are learned


@dataclass(frozen=True)
class _Item:
    """One drawn sample: its index, texts (captions, or questions with an answer) and view."""

    index: int
    texts: list[Text]
    pixels: Tensor | None
    features: Tensor | None


class StepDataset(Dataset[Batch]):
    """Batch number N of one process."""

    def __init__(
        self,
        collection: Collection,
        batch: int,
        seed: int,
        spec: ImageSpec | None,
        features: FeatureCache | None,
        augment: bool,
        crop_min: float,
        rank: int,
        world: int,
        texts: str = "captions",
        texts_per_image: int = 1,
        clean: bool = False,
    ) -> None:
        self.texts, self.texts_per_image, self.clean = texts, texts_per_image, clean
        self.collection, self.batch, self.seed, self.spec = collection, batch, seed, spec
        self.features, self.augment, self.crop_min = features, augment, crop_min
        self.rank, self.world = rank, world
        # What a feature cache could not encode is out; everything else may be drawn.
        self.usable = np.array(features.usable if features is not None else range(len(collection.samples)), np.int64)
        names = {name: n for n, name in enumerate(dict.fromkeys(s.image_id for s in collection.samples))}
        self.image_ids = [names[sample.image_id] for sample in collection.samples]
        self.seen_bad: set[str] = set()
        self._order: tuple[int, np.ndarray, np.ndarray | None] | None = None
        self._places: int | None = None  # of an epoch of a mixture
        self._ends = np.cumsum([size for size, _ in collection.mixture])
        self._weights = tuple(weight for _, weight in collection.mixture)

    def drop_silent(self) -> list[BadSample]:
        """Leave out what has no text of the wanted kind (a bare photograph): nothing can be learned from it."""
        samples, asks = self.collection.samples, self.texts == "questions"
        told = np.array([bool(_answered(samples[i]) if asks else samples[i].captions) for i in self.usable], bool)
        silent = [samples[index] for index in self.usable[~told]]
        self.usable = self.usable[told]
        self._places, self._order = None, None
        reason = "no question with an answer" if asks else "no caption"
        return [BadSample(sample.key, sample.path, reason) for sample in silent]

    def texts_of(self, index: int, rng: np.random.Generator) -> list[Text]:
        """Texts of a sample drawn at random: none twice before all were drawn."""
        sample = self.collection.samples[index]
        if self.texts == "questions":
            asked = list(_answered(sample))
            return [
                (question.answers[int(rng.integers(len(question.answers)))], question.text)
                for question in (asked[n] for n in self._draw(len(asked), rng))
            ]
        captions = sample.captions or ("",)
        drawn = [self.caption(captions[n]) for n in self._draw(len(captions), rng)]
        count = int(rng.binomial(len(drawn), _QUESTIONS)) if self.texts == "both" else 0
        about = (_answered(sample) or questions_from(sample.captions)) if count else ()
        if about:
            order = rng.permutation(len(about))
            drawn[:count] = [(about[n].answers[0], about[n].text) for n in np.resize(order, count)]
        return drawn

    def caption(self, text: str) -> Text:
        """A caption as it is learned."""
        return clean_caption(text) if self.clean else text, None

    def _draw(self, among: int, rng: np.random.Generator) -> list[int]:
        if self.texts_per_image == 1:
            return [int(rng.integers(among))]
        return [int(n) for n in np.resize(rng.permutation(among), self.texts_per_image)]

    @property
    def per_epoch(self) -> int:
        if not self._weights:
            return len(self.usable) // self.batch
        if self._places is None:
            self._places = epoch_size(self._parts(), self._weights)
        return self._places // self.batch

    def __getitem__(self, step: int) -> Batch:
        epoch, number = divmod(step, self.per_epoch)
        share = self.batch // self.world
        start = number * self.batch + self.rank * share
        places, turns = self._permutation(epoch)
        skipped: list[BadSample] = []
        items = [
            self._item(int(places[n]), epoch, skipped, () if turns is None else (int(turns[n]),))
            for n in range(start, start + share)
        ]
        fresh = [bad for bad in skipped if bad.key not in self.seen_bad]
        self.seen_bad |= {bad.key for bad in fresh}
        return self._batch(items, fresh)

    def _permutation(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Places of an epoch in order; in a mixture also which turn of its part each belongs to."""
        if self._order is None or self._order[0] != epoch:
            if self._weights:
                self._order = epoch, *epoch_order(self._parts(), self._weights, self.seed, epoch)
            else:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.usable))
                self._order = epoch, order, None
        return self._order[1], self._order[2]

    def _parts(self) -> np.ndarray:
        """Which part of the mixture each usable sample belongs to."""
        return np.searchsorted(self._ends, self.usable, side="right")

    def _item(self, place: int, epoch: int, skipped: list[BadSample], turn: tuple[int, ...] = ()) -> _Item:
        """The sample at a place of the usable ones, or the next one that can be decoded.

        A mixture may have a sample several times in an epoch: its turn makes each another draw.
        """
        for offset in range(len(self.usable)):
            index = int(self.usable[(place + offset) % len(self.usable)])
            sample = self.collection.samples[index]
            rng = np.random.default_rng([self.seed, epoch, index, *turn])
            texts = self.texts_of(index, rng)
            if self.features is not None:
                view = int(rng.integers(self.features.views))
                return _Item(index, texts, None, self.features.get([index], [view])[0])
            try:
                return _Item(index, texts, self._pixels(index, rng), None)
            except BadSampleError as error:
                skipped.append(BadSample(sample.key, sample.path, error.reason))
        raise DataError(f"{self.collection.name}: not one image can be decoded; run `blip2 data check` on it")

    def _pixels(self, index: int, rng: np.random.Generator) -> Tensor:
        assert self.spec is not None
        data = self.collection.samples[index].read()
        if self.augment:
            return decode_augmented(data, self.spec, rng, self.crop_min)
        return plain_view(decode_image(data), self.spec)

    def _batch(self, items: list[_Item], skipped: list[BadSample]) -> Batch:
        pixels = [item.pixels for item in items if item.pixels is not None]
        features = [item.features for item in items if item.features is not None]
        texts = [text for one in zip(*(item.texts for item in items), strict=True) for text in one]
        return Batch(
            [self.collection.samples[item.index].key for item in items],
            torch.tensor([self.image_ids[item.index] for item in items]),
            [caption for caption, _ in texts],
            torch.stack(pixels) if pixels else None,
            torch.stack(features) if features else None,
            skipped,
            [question or "" for _, question in texts] if self.texts != "captions" else None,
        )


class _Guarded(Dataset["Batch | DataError"]):
    """Hands errors over as values: a loader process would wrap them in its own traceback."""

    def __init__(self, steps: StepDataset) -> None:
        self.steps = steps

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self.steps[step]
        except DataError as error:
            return error


class TrainingBatches:
    """The endless stream of one process's training batches, from any step on.

    Args:
        batch: samples of a step over all processes.
        spec: how images are prepared; may be None where `features` is given.
        features: cached features instead of images.
        augment, crop_min: random crops and flips of images.
        rank, world: this process and how many there are.
        workers: loader processes; 0 loads in this one.
        texts: `captions`, `questions` with their answers, or `both`.
        texts_per_image: texts drawn of each image.
        clean: captions through `clean_caption`.

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
        self._steps = StepDataset(
            collection, batch, seed, spec, features, augment, crop_min, rank, world, texts, texts_per_image, clean
        )
        silent = self._steps.drop_silent()
        if batch % world:
            raise DataError(f"train.batch {batch} cannot be shared equally by {world} processes")
        if self._steps.per_epoch == 0:
            raise DataError(
                f"{collection.name}: {len(self._steps.usable)} usable samples with {_WANTED[texts]} are fewer than a "
                f"batch of {batch}: lower train.batch or give more data"
            )
        self.collection, self.workers = collection, workers
        self.bad: list[BadSample] = (list(features.bad) if features is not None else []) + silent

    def steps_from(self, step: int) -> Iterator[Batch]:
        """Batches of steps `step`, `step + 1`, ... without end."""
        for batch in self._source(step):
            known = {bad.key for bad in self.bad}
            batch.skipped = [bad for bad in batch.skipped if bad.key not in known]
            self.bad += batch.skipped
            yield batch

    def _source(self, step: int) -> Iterator[Batch]:
        if self.workers == 0:
            while True:
                yield self._steps[step]
                step += 1
        loader: DataLoader[Batch | DataError] = DataLoader(
            _Guarded(self._steps),
            sampler=_From(step),
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


class _From(torch.utils.data.Sampler[int]):
    """step, step + 1, ... without end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __iter__(self) -> Iterator[int]:
        step = self.step
        while True:
            yield step
            step += 1


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
    steps = StepDataset(
        collection,
        1,
        0,
        spec,
        features,
        augment=False,
        crop_min=1.0,
        rank=0,
        world=1,
        texts=texts,
        clean=clean,
    )
    if texts == "questions":
        steps.drop_silent()
    items: list[_Item] = []
    for index in map(int, steps.usable):
        captions = collection.samples[index].captions
        drawn = [steps.caption(captions[0] if captions else "")]
        if texts == "questions":
            drawn = steps.texts_of(index, np.random.default_rng([0, index]))
        if features is not None:
            items.append(_Item(index, drawn, None, features.get([index], [0])[0]))
        else:
            try:
                pixels = steps._pixels(index, np.random.default_rng(0))
            except BadSampleError:
                continue
            items.append(_Item(index, drawn, pixels, None))
        if len(items) == batch:
            yield steps._batch(items, [])
            items = []
    if items:
        yield steps._batch(items, [])


def _answered(sample: Sample) -> tuple[Question, ...]:
    return tuple(question for question in sample.questions if question.answers)
