"""Visual Genome: the phrases of an image's regions as its captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from blip2.data.collection import RawSample
from blip2.data.convert.captions import read_coco
from blip2.data.convert.locate import Images, annotation, expecting, images_of, load_json
from blip2.data.convert.records import Request, Unit, split_into_units


def read_genome(request: Request) -> list[Unit]:
    """`region_descriptions.json` with images `VG_100K*/ID.jpg`, or LAVIS's `vg_caption.json`.

    `boxes` holds [x, y, width, height] of each caption's region in pixels of the original;
    `coco_id` comes from `image_data.json` where that lies beside.
    """
    path = annotation(request, "region_descriptions*.json", "vg_caption*.json")
    data = load_json(path)
    if data and isinstance(data, list) and isinstance(data[0], dict) and "caption" in data[0]:
        return read_coco(replace(request, source=path, split=None))
    images = images_of(request)
    image_data = path.with_name("image_data.json")
    coco: dict[int, Any] = {}
    if image_data.is_file():
        with expecting(image_data, "Visual Genome's image data"):
            coco = {image["image_id"]: image.get("coco_id") for image in load_json(image_data)}
    with expecting(path, "Visual Genome's region descriptions"):
        return split_into_units(_samples(data, images, coco), request.size)


def _samples(data: Any, images: Images, coco: dict[int, Any]) -> Iterator[RawSample]:
    for image in data:
        regions: dict[str, list[int]] = {}
        for region in image["regions"]:
            box = [int(region[name]) for name in ("x", "y", "width", "height")]
            regions.setdefault(region["phrase"].strip(), box)
        number = image["id"] if "id" in image else image["image_id"]
        entry = {"image_id": str(number), "captions": list(regions), "boxes": list(regions.values())}
        if coco.get(number) is not None:
            entry["coco_id"] = str(coco[number])
        yield RawSample(f"vg-{number}", entry, images.find(f"{number}.jpg"))
