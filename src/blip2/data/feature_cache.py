"""Frozen features once: a memory-mapped bf16 file that is filled once and read every epoch.

Shape letters: N samples, P patches, C image-encoder channels, S side in pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from blip2.data.collection import BadSample, BadSampleError, Collection
from blip2.data.images import ImageSpec, decode_augmented, decode_image, plain_view
from blip2.errors import DataError
from blip2.io.atomic import read_json, write_json
from blip2.ops.devices import to_numpy

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

Encode = Callable[[Tensor], Tensor]
_FEATURES, _META, _PROGRESS = "features.bin", "meta.json", "progress.json"


class FeatureCache:
    """Features [views, N, P, C] of a collection on disk.

    Args:
        folder: made by `open_or_build`.
    """

    def __init__(self, folder: Path, keys: list[str], paths: list[str]) -> None:
        meta = json.loads((folder / _META).read_text("utf-8"))
        self.shape: tuple[int, ...] = tuple(meta["shape"])
        self.views = self.shape[0]
        bad = {int(index): reason for index, reason in meta["bad"].items()}
        self.bad = [BadSample(keys[index], paths[index], reason) for index, reason in bad.items()]
        self.usable = [index for index in range(self.shape[1]) if index not in bad]
        self._path = folder / _FEATURES
        self._raw = np.memmap(self._path, dtype=np.uint16, mode="r", shape=self.shape)

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapping: a pickled one would carry the whole file to a loader process."""
        return {name: value for name, value in self.__dict__.items() if name != "_raw"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._raw = np.memmap(self._path, dtype=np.uint16, mode="r", shape=self.shape)

    def get(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Features [B, P, C] in bfloat16 of the samples at `indices`, each in the view asked for."""
        rows = self._raw[np.asarray(views), np.asarray(indices)]
        return torch.from_numpy(rows).view(torch.bfloat16)

    @classmethod
    def open_or_build(
        cls,
        folder: Path,
        collection: Collection,
        *,
        spec: ImageSpec,
        encoder_id: str,
        encode: Encode,
        views: int = 1,
        crop_min: float = 0.5,
        seed: int = 0,
        batch: int = 32,
        progress: bool = True,
        rank: int = 0,
    ) -> FeatureCache:
        """Open the cache of a collection below `folder`, or encode it first.

        View 0 is the plain image, further ones are random crops. Encoding that was stopped goes on
        where it was. Images that cannot be decoded are recorded with their reasons and left out. Of
        processes that want the same cache one encodes, the others wait and open it.

        Args:
            encoder_id: says which encoder, layer and pooling `encode` is.
            encode: [B, 3, S, S] float32 -> [B, P, C].
            rank: only rank 0 shows progress.

        Raises:
            DataError: the folder cannot be written, or no image can be decoded.
        """
        what = f"{collection.fingerprint()}|{encoder_id}|{spec}|{views}|{crop_min if views > 1 else ''}|"
        name = hashlib.sha256(f"{what}{seed if views > 1 else ''}".encode()).hexdigest()[:16]
        target = folder / name
        keys, paths = [s.key for s in collection.samples], [s.path for s in collection.samples]
        try:
            if not _complete(target):
                target.mkdir(parents=True, exist_ok=True)
                with _locked(target):
                    if not _complete(target):
                        builder = _Builder(target, collection, spec, encode, views, crop_min, seed, batch)
                        builder.run(progress and rank == 0)
            return cls(target, keys, paths)
        except OSError as error:
            raise DataError(
                f"{target}: feature cache cannot be written: {error.strerror or error}; "
                "free the space or set BLIP2_CACHE to another folder"
            ) from error


def _complete(folder: Path) -> bool:
    """Whether a cache is finished and its file is as long as it says."""
    meta = read_json(folder / _META) or {}
    return "shape" in meta and _size(folder / _FEATURES) == _bytes(meta["shape"])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine fills the folder; a killed one lets go by itself."""
    if fcntl is None:
        yield
        return
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bytes(shape: Sequence[int]) -> int:
    return 2 * math.prod(shape)


@dataclass(frozen=True)
class _Builder:
    """Fills a cache folder batch by batch; a progress file follows every flush."""

    folder: Path
    collection: Collection
    spec: ImageSpec
    encode: Encode
    views: int
    crop_min: float
    seed: int
    batch: int

    def run(self, progress: bool) -> None:
        state = self._state()
        done, bad, shape = int(state.get("done", 0)), dict(state.get("bad", {})), state.get("shape")
        raw = self._open(shape) if shape else None
        count = len(self.collection.samples)
        total = self.views * count
        bar = tqdm(
            total=total,
            initial=done,
            unit="image",
            desc="encoding images",
            disable=not progress,
            mininterval=0.1 if sys.stderr.isatty() else 20.0,  # a log file wants few lines
        )
        with bar, closing(self._loaded(done, total)) as batches:
            for places, loaded in batches:
                pairs = list(zip(places, loaded, strict=True))
                good = [(place, view) for place, view in pairs if isinstance(view, Tensor)]
                bad |= {str(place % count): reason for place, reason in pairs if isinstance(reason, str)}
                if good:
                    rows = self._encoded([view for _, view in good])
                    if raw is None:
                        shape = [self.views, count, *rows.shape[1:]]
                        raw = self._open(shape)
                    for (place, _), row in zip(good, rows, strict=True):
                        raw[divmod(place, count)] = row
                    raw.flush()
                write_json(self.folder / _PROGRESS, {"done": places[-1] + 1, "bad": bad, "shape": shape})
                bar.update(len(places))
        if shape is None:
            raise DataError(f"{self.collection.name}: not one image can be decoded; run `blip2 data check` on it")
        write_json(self.folder / _META, {"shape": shape, "bad": bad})
        (self.folder / _PROGRESS).unlink(missing_ok=True)

    def _loaded(self, done: int, total: int) -> Generator[tuple[range, list[Tensor | str]], None, None]:
        """Views of one batch after the other; the next is read while the last is encoded."""
        ranges = [range(start, min(start + self.batch, total)) for start in range(done, total, self.batch)]
        pending: deque[tuple[range, Iterator[Tensor | str]]] = deque()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for following in ranges:
                pending.append((following, pool.map(self._view, following)))
                if len(pending) > 1:
                    places, views = pending.popleft()
                    yield places, list(views)
            for places, views in pending:
                yield places, list(views)

    def _encoded(self, views: list[Tensor]) -> np.ndarray:
        features = self.encode(torch.stack(views)).detach().to("cpu", torch.bfloat16)
        rows: np.ndarray = to_numpy(features.contiguous().view(torch.uint16))
        return rows

    def _view(self, place: int) -> Tensor | str:
        """The normalised view at a place, or the reason why there is none."""
        view, index = divmod(place, len(self.collection.samples))
        try:
            data = self.collection.samples[index].read()
            if view == 0:
                return plain_view(decode_image(data), self.spec)
            return decode_augmented(data, self.spec, np.random.default_rng([self.seed, view, index]), self.crop_min)
        except BadSampleError as error:
            return error.reason

    def _open(self, shape: Sequence[int]) -> np.memmap:
        path = self.folder / _FEATURES
        if _size(path) != _bytes(shape):
            try:
                _reserve(path, _bytes(shape))
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return np.memmap(path, dtype=np.uint16, mode="r+", shape=tuple(shape))

    def _state(self) -> dict[str, Any]:
        """How far an earlier process came; nothing where its features are gone."""
        state = read_json(self.folder / _PROGRESS) or {}
        shape = state.get("shape")
        if shape is None or _size(self.folder / _FEATURES) != _bytes(shape):
            return {}
        return state


def _reserve(path: Path, size: int) -> None:
    """Take the space now: a full disk must be an error here, not a fault in the mapping later."""
    with path.open("wb") as handle:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, size)
        else:
            handle.truncate(size)
