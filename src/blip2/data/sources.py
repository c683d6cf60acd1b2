"""From a name or path to a `Collection`: named sets, shards, folders, JSONL files."""

from __future__ import annotations

import glob
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

from braceexpand import braceexpand

from blip2.data.collection import BadSample, Collection, Sample
from blip2.data.convert.forms import form_of
from blip2.data.easyvqa import build_easy_vqa
from blip2.data.folders import read_folder, read_jsonl
from blip2.data.mixture import Part, parse_mixture
from blip2.data.shards.reader import read_shards
from blip2.errors import DataError
from blip2.io.paths import cache_folder
from blip2.io.remote import fetch_all, is_remote

# Sets of local shards: the folder below a data folder, and the splits there are.
_SHARDS = {
    "flickr8k": ("flickr8k", ("train", "dev")),
    "coco": ("photos/coco", ("train", "dev")),
    "daquar": ("photos/daquar", ("train", "test")),
    "scenes": ("photos/scenes", ("train",)),
    "objects": ("photos/objects", ("train", "dev")),
    "imagenet": ("photos/imagenet", ("train",)),
    "caltech101": ("photos/caltech101", ("train",)),
}
NAMED = (
    *(f"{name}:{split}" for name, (_, splits) in _SHARDS.items() for split in splits),
    *("easy-vqa:train", "easy-vqa:dev", "easy-vqa:test", "skimage"),
)
# Of the four images of each of the 200 things of objects, in this order, the last is dev: there is no other split.
_OBJECTS_DEV = 4
# Of easy-vqa's 4,000 training images, which the package does not split, the last ones are dev.
_EASY_VQA_DEV = 400
# Colour images that ship inside scikit-image's wheel.
_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def open_collection(spec: str) -> Collection:
    """Index a data set, or a mixture of several (`a.tar*2+b.tar`, see `mixture`).

    Args:
        spec: a named set (`flickr8k:train`, `easy-vqa:test`, see `NAMED`), shards (a file, glob, brace
            range, address, or folder of .tar), a folder of images with sidecar texts, or a .jsonl file.

    Raises:
        DataError: not found, unknown, or without a single usable sample; says what to do.
    """
    parts = parse_mixture(spec)
    if len(parts) > 1 or parts[0].spec != spec:
        return _mixed(spec, parts)
    collection = index(spec)
    if not collection.samples:
        if collection.bad:
            first = collection.bad[0]
            path = Path(spec).expanduser()
            reader = _converter(path) if path.is_dir() and not any(path.glob("*.tar")) else ""
            raise DataError(f"{spec}: every sample is bad, the first: {first.key}: {first.reason}{reader}")
        raise DataError(f"{spec}: nothing in it: expected .tar shards, or images with a .txt beside each")
    return collection


def _mixed(spec: str, parts: list[Part]) -> Collection:
    """All parts one after the other; equal image ids of two data sets are two images."""
    mixed = Collection(spec, [])
    for number, part in enumerate(parts):
        collection = open_collection(part.spec)
        mixed.samples += [replace(sample, image_id=f"{number}:{sample.image_id}") for sample in collection.samples]
        mixed.bad += collection.bad
        mixed.mixture += ((len(collection.samples), part.weight),)
        mixed.note = "; ".join(filter(None, (mixed.note, collection.note)))
    return mixed


def index(spec: str) -> Collection:
    """As `open_collection`, but a data set may be empty or all bad (`blip2 data check` shows why)."""
    if not spec:
        raise DataError("an empty name: give a data set (`.` is this folder)")
    name, _, split = spec.partition(":")
    if name == "easy-vqa" and split in ("train", "dev", "test"):
        return _easy_vqa(spec, split)
    if name == "objects" and split in ("train", "dev"):
        return _objects(spec, split)
    if spec == "skimage":
        return _skimage()
    if is_remote(spec):
        return _remote(spec)
    shards = _local_shards(spec)
    if shards:
        return read_shards(spec, shards)
    path = Path(spec).expanduser()
    if path.is_dir():
        return read_folder(path)
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(path)
    if path.exists():
        reader = _converter(path)
        raise DataError(f"{spec}: not a data set: give .tar shards, a .jsonl file, or a folder of images{reader}")
    raise DataError(f"{spec}: no such file or folder, and not a named set ({', '.join(NAMED)})")


def _converter(path: Path) -> str:
    """The end of a message: which converter reads annotations of another form; empty where none does."""
    form = form_of(path) if path.exists() else None
    if form is None or not form.kinds or form.kinds[0] == "folder":
        return ""
    return f" ({form.what}: `blip2 data convert {form.path} OUT --from {form.kinds[0]}` makes shards of it)"


def shard_paths(spec: str) -> list[Path]:
    """The tar shards that a data set's name, path, glob, brace range or folder means.

    Raises:
        DataError: there are none.
    """
    shards = _local_shards(spec)
    if not shards:
        raise DataError(f"{spec}: no .tar shards: make them with `blip2 data convert`")
    return shards


def _local_shards(spec: str) -> list[Path]:
    """The shards that a spec means; none where it means something else."""
    name, _, split = spec.partition(":")
    if name in _SHARDS and split in _SHARDS[name][1]:
        return _named_shards(name, split)
    path = Path(spec).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return _expand(str(path)) if spec.endswith(".tar") else []


def _expand(spec: str) -> list[Path]:
    """Shards of a path, glob or brace range. What exists is itself before it is a pattern, folders on the way too."""
    path = Path(spec)
    folder = next(place for place in (path, *path.parents) if place.exists())
    if folder == path:
        return [path]
    shards: list[Path] = []
    for pattern in _expand_braces(spec, str(path.relative_to(folder))):
        shard = folder / pattern
        matches = [shard] if shard.exists() else sorted(folder / name for name in glob.glob(pattern, root_dir=folder))
        if not matches:
            raise DataError(f"{shard}: no such shard")
        shards += matches
    return shards


def _expand_braces(spec: str, pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{spec}: not a brace pattern that can be expanded: {error}") from error


def _remote(spec: str) -> Collection:
    """Shards of an address with braces; what could not be fetched is among the bad samples."""
    urls = _expand_braces(spec, spec)
    if not all(url.endswith(".tar") for url in urls):
        raise DataError(f"{spec}: not shards: give addresses that end in .tar, with braces for several")
    copies = fetch_all(urls)
    collection = read_shards(spec, [copy for copy in copies if isinstance(copy, Path)])
    lost = [BadSample(url, url, copy) for url, copy in zip(urls, copies, strict=True) if isinstance(copy, str)]
    return Collection(spec, collection.samples, [*lost, *collection.bad])


def _named_shards(name: str, split: str) -> list[Path]:
    repository = Path(__file__).resolve().parents[3]
    places = [Path("..") / "shared", repository.parent / "shared", cache_folder()]
    if os.environ.get("BLIP2_DATA"):
        places.insert(0, Path(os.environ["BLIP2_DATA"]).expanduser())
    folder = _SHARDS[name][0]
    for place in places:
        shards = sorted((place / folder).glob(f"{split}-*.tar"))
        if shards:
            return shards
    tried = ", ".join(dict.fromkeys(str(place / folder) for place in places))
    raise DataError(
        f"{name}:{split}: no shards {split}-*.tar found (looked in {tried}): put them there, or set BLIP2_DATA to the "
        f"folder that holds {folder}/"
    )


def _easy_vqa(spec: str, split: str) -> Collection:
    source = "test" if split == "test" else "train"
    shards = sorted(build_easy_vqa(source, cache_folder() / "easy-vqa").glob(f"{source}-*.tar"))
    packed = read_shards(spec, shards)
    cut = len(packed.samples) - _EASY_VQA_DEV
    part = {"train": slice(0, cut), "dev": slice(cut, None), "test": slice(None)}[split]
    return Collection(spec, packed.samples[part], packed.bad)


def _objects(spec: str, split: str) -> Collection:
    packed = read_shards(spec, _named_shards("objects", "train"))
    held_back = [number % _OBJECTS_DEV == _OBJECTS_DEV - 1 for number in range(len(packed.samples))]
    samples = [s for s, is_dev in zip(packed.samples, held_back, strict=True) if is_dev == (split == "dev")]
    return Collection(spec, samples, packed.bad)


def _skimage() -> Collection:
    package = importlib.util.find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        raise DataError("skimage: scikit-image is not installed: pip install scikit-image")
    folder = Path(package.submodule_search_locations[0]) / "data"
    files = [folder / name for name in _SKIMAGE if (folder / name).is_file()]
    return Collection("skimage", [Sample(file.stem, file.stem, (), str(file)) for file in files])
