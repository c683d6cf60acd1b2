"""COCO, Flickr30k and NoCaps: one annotation file, captions by image."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blip2.data.collection import RawSample
from blip2.data.convert.locate import Images, annotation, expecting, images_of, load_json
from blip2.data.convert.records import Request, Unit, clean_key, merge_by_image, split_into_units
from blip2.data.convert.rows import read_text
from blip2.data.entries import text_lines
from blip2.errors import DataError

DOMAINS = {"in-domain": "in", "near-domain": "near", "out-domain": "out", "in": "in", "near": "near", "out": "out"}
_KNOWN_SPLITS = "train (with restval), val, test"


def read_coco(request: Request) -> list[Unit]:
    """COCO: Karpathy's `dataset_coco.json`, LAVIS's `coco_karpathy_SPLIT.json`, or `captions_SPLIT.json`."""
    split = request.split or "train"
    names = ("dataset_coco.json", f"coco_karpathy_{split}*.json", f"captions_{split}*.json")
    return _units(request, annotation(request, *names))


def read_nocaps(request: Request) -> list[Unit]:
    """NoCaps: `nocaps_val_4500_captions.json`; the domain of an image (in, near, out) is kept."""
    split = request.split or "val"
    names = (f"nocaps_{split}_4500_captions.json", f"nocaps_{split}*.json")
    return _units(request, annotation(request, *names))


def read_flickr30k(request: Request) -> list[Unit]:
    """Flickr30k: Karpathy's `dataset_flickr30k.json`, LAVIS's JSON, `results_*.token` or `results.csv`."""
    names = ("dataset_flickr30k.json", f"flickr30k_{request.split or 'train'}*.json", "results*.token", "results.csv")
    path = annotation(request, *names)
    if path.suffix == ".json":
        return _units(request, path)
    if request.split is not None:
        raise DataError(f"{path}: names no splits: use dataset_flickr30k.json, or leave out --split")
    images = images_of(request)
    with expecting(path, "a Flickr30k token file"):
        samples = merge_by_image(_sample(images, name, [text]) for name, text in _tokens(path))
        return split_into_units(samples, request.size)


def _units(request: Request, path: Path) -> list[Unit]:
    """Units of a JSON file, whichever of the three forms it has."""
    data = load_json(path)
    images = images_of(request)
    forms: tuple[tuple[bool, str, Callable[[Any, Images], Iterator[RawSample]]], ...] = (
        (isinstance(data, list), "a list of images with captions", _listed),
        (isinstance(data, dict) and "annotations" in data, "a file of images and annotations with captions", _original),
        (isinstance(data, dict) and "images" in data, "Karpathy's split file", _karpathy),
    )
    for matches, what, read in forms:
        if matches:
            with expecting(path, what):
                samples = merge_by_image(read(data, images))
            return split_into_units(_of_split(samples, request.split, path), request.size)
    raise DataError(f"{path}: not an annotation file of captions: no sentences, captions or annotations in it")


def _of_split(samples: list[RawSample], split: str | None, path: Path) -> list[RawSample]:
    """Samples of a split where the file names splits; one that does not is of one split."""
    if split is None or not any("split" in sample.entry for sample in samples):
        return samples
    names = ("train", "restval") if split == "train" else (split,)
    of_split = [sample for sample in samples if sample.entry.get("split") in names]
    if not of_split:
        raise DataError(f"{path}: no image of split {split!r}: there are {_KNOWN_SPLITS}")
    return of_split


def _karpathy(data: Any, images: Images) -> Iterator[RawSample]:
    """{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}], "cocoid"}]}"""
    for image in data["images"]:
        name = "/".join(part for part in (image.get("filepath", ""), image["filename"]) if part)
        captions = [sentence["raw"] for sentence in image["sentences"]]
        yield _sample(images, name, captions, image.get("cocoid", image.get("imgid")), split=image["split"])


def _listed(data: Any, images: Images) -> Iterator[RawSample]:
    """[{"image": path, "caption": one or several, "image_id"}], as LAVIS keeps every caption set."""
    for row in data:
        captions = [row["caption"]] if isinstance(row["caption"], str) else list(row["caption"])
        yield _sample(images, row["image"], captions, row.get("image_id", row.get("img_id")), **_domain(row))


def _original(data: Any, images: Images) -> Iterator[RawSample]:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, COCO's own and NoCaps's."""
    captions: dict[Any, list[str]] = {}
    for row in data["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    for image in data["images"]:
        open_images = {"open_images_id": image["open_images_id"]} if "open_images_id" in image else {}
        texts = captions.get(image["id"], [])
        yield _sample(images, image["file_name"], texts, image["id"], **open_images, **_domain(image))


def _domain(row: dict[str, Any]) -> dict[str, str]:
    if "domain" not in row:
        return {}
    if row["domain"] not in DOMAINS:
        raise ValueError(f"domain {row['domain']!r} is none of {', '.join(list(DOMAINS)[:3])}")
    return {"domain": DOMAINS[row["domain"]]}


def _tokens(path: Path) -> Iterator[tuple[str, str]]:
    """(image, caption) of `1.jpg#0<TAB>text` lines, or of `image_name| comment_number| comment` ones."""
    text = read_text(path)
    if path.suffix == ".csv":
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="|" if "|" in text.partition("\n")[0] else ",")
        header = [name.strip() for name in next(rows, [])]
        if header[:1] not in (["image_name"], ["image"]) or header[-1] not in ("comment", "caption"):
            raise ValueError(f"its columns are {', '.join(header)}")
        yield from ((row[0].strip(), row[-1].strip()) for row in rows if row)
        return
    for line in text_lines(text):
        if line.strip():
            name, caption = line.split("\t")
            yield name.rpartition("#")[0], caption


def _sample(images: Images, name: str, captions: list[str], image_id: Any = None, **more: Any) -> RawSample:
    stem = Path(name).stem
    entry = {"image_id": str(stem if image_id is None else image_id), "captions": captions, **more}
    return RawSample(clean_key(stem), entry, images.find(name))
