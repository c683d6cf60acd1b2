"""COCO, Flickr30k and NoCaps: one annotation file, captions by image."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blip2.data.convert.locate import Images, annotation, expecting, images_of, load_json
from blip2.data.convert.records import Item, Request, Unit, clean_key, cut, grouped
from blip2.errors import DataError

DOMAINS = {"in-domain": "in", "near-domain": "near", "out-domain": "out", "in": "in", "near": "near", "out": "out"}
_KNOWN_SPLITS = "train (with restval), val, test"


def read_coco(request: Request) -> list[Unit]:
    """COCO: Karpathy's `dataset_coco.json`, LAVIS's `coco_karpathy_SPLIT.json`, or `captions_SPLIT.json`."""
    split = request.split or "train"
    return _read(request, "dataset_coco.json", f"coco_karpathy_{split}*.json", f"captions_{split}*.json")


def read_nocaps(request: Request) -> list[Unit]:
    """NoCaps: `nocaps_val_4500_captions.json`; the domain of an image (in, near, out) is kept."""
    split = request.split or "val"
    path = annotation(request, f"nocaps_{split}_4500_captions.json", f"nocaps_{split}*.json")
    return _units(request, path, load_json(path))


def read_flickr30k(request: Request) -> list[Unit]:
    """Flickr30k: Karpathy's `dataset_flickr30k.json`, LAVIS's JSON, `results_*.token` or `results.csv`."""
    names = ("dataset_flickr30k.json", f"flickr30k_{request.split or 'train'}*.json", "results*.token", "results.csv")
    path = annotation(request, *names)
    if path.suffix == ".json":
        return _units(request, path, load_json(path))
    if request.split is not None:
        raise DataError(f"{path}: tells no splits: use dataset_flickr30k.json, or leave out --split")
    images = images_of(request, path)
    with expecting(path, "a Flickr30k token file"):
        return cut(grouped(_item(images, name, text) for name, text in _tokens(path)), request.size)


def _read(request: Request, *names: str) -> list[Unit]:
    path = annotation(request, *names)
    return _units(request, path, load_json(path))


def _units(request: Request, path: Path, data: Any) -> list[Unit]:
    """Units of a JSON file, whichever of the three forms it has."""
    images = images_of(request, path)
    forms: tuple[tuple[bool, str, Callable[[Any, Images], Iterator[Item]]], ...] = (
        (isinstance(data, list), "a list of images with captions", _listed),
        (isinstance(data, dict) and "annotations" in data, "a COCO captions file", _original),
        (isinstance(data, dict) and "images" in data, "Karpathy's split file", _karpathy),
    )
    for matches, what, read in forms:
        if matches:
            with expecting(path, what):
                items = grouped(read(data, images))
            return cut(_of_split(items, request.split, path), request.size)
    raise DataError(f"{path}: not an annotation file of captions: expected Karpathy's, LAVIS's or COCO's own")


def _of_split(items: list[Item], split: str | None, path: Path) -> list[Item]:
    """Items of a split where the file tells splits; one that does not is of one split."""
    if split is None or not any("split" in item.entry for item in items):
        return items
    wanted = ("train", "restval") if split == "train" else (split,)
    kept = [item for item in items if item.entry.get("split") in wanted]
    if not kept:
        raise DataError(f"{path}: no image of split {split!r}: there are {_KNOWN_SPLITS}")
    return kept


def _karpathy(data: Any, images: Images) -> Iterator[Item]:
    """{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}], "cocoid"}]}"""
    for image in data["images"]:
        name = "/".join(part for part in (image.get("filepath", ""), image["filename"]) if part)
        captions = [sentence["raw"] for sentence in image["sentences"]]
        found = _item(images, name, *captions, image_id=image.get("cocoid", image.get("imgid")))
        yield Item(found.key, {**found.entry, "split": image["split"]}, found.path)


def _listed(data: Any, images: Images) -> Iterator[Item]:
    """[{"image": path, "caption": one or several, "image_id"}], as LAVIS keeps every caption set."""
    for row in data:
        captions = [row["caption"]] if isinstance(row["caption"], str) else list(row["caption"])
        found = _item(images, row["image"], *captions, image_id=row.get("image_id", row.get("img_id")))
        yield Item(found.key, found.entry | _domain(row), found.path)


def _original(data: Any, images: Images) -> Iterator[Item]:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, COCO's own and NoCaps's."""
    captions: dict[Any, list[str]] = {}
    for row in data["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    for image in data["images"]:
        found = _item(images, image["file_name"], *captions.get(image["id"], ()), image_id=image["id"])
        more = {name: image[name] for name in ("open_images_id",) if name in image}
        yield Item(found.key, found.entry | more | _domain(image), found.path)


def _domain(row: dict[str, Any]) -> dict[str, str]:
    if "domain" not in row:
        return {}
    if row["domain"] not in DOMAINS:
        raise ValueError(f"domain {row['domain']!r} is none of {', '.join(list(DOMAINS)[:3])}")
    return {"domain": DOMAINS[row["domain"]]}


def _tokens(path: Path) -> Iterator[tuple[str, str]]:
    """(image, caption) of `1.jpg#0<TAB>text` lines, or of `image_name| comment_number| comment` ones."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text") from error
    if path.suffix == ".csv":
        rows = csv.reader(io.StringIO(text), delimiter="|" if "|" in text.partition("\n")[0] else ",")
        next(rows, None)
        yield from ((row[0].strip(), row[-1].strip()) for row in rows if row)
        return
    for line in text.splitlines():
        if line.strip():
            name, caption = line.split("\t")
            yield name.rpartition("#")[0], caption


def _item(images: Images, name: str, *captions: str, image_id: Any = None) -> Item:
    stem = Path(name).stem
    entry = {"image_id": str(stem if image_id is None else image_id), "captions": list(captions)}
    return Item(clean_key(stem), entry, images.find(name))
