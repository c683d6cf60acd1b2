"""What the paper reports (arXiv 2301.12597, tables 1 to 5), to stand beside what is measured here."""

from __future__ import annotations

from collections.abc import Mapping

# (model preset, data set) -> metric -> value in percent.
_CAPTION: dict[tuple[str, str], dict[str, float]] = {
    ("blip2-opt-2.7b-coco", "coco"): {"bleu4": 43.7, "cider": 145.8},
    ("blip2-opt-6.7b-coco", "coco"): {"bleu4": 43.5, "cider": 145.2},
    ("blip2-flan-t5-xl-coco", "coco"): {"bleu4": 42.4, "cider": 144.5},
    ("blip2-opt-2.7b-coco", "nocaps"): {"cider": 119.7},
    ("blip2-opt-6.7b-coco", "nocaps"): {"cider": 121.0},
    ("blip2-flan-t5-xl-coco", "nocaps"): {"cider": 121.6},
}
_VQA: dict[tuple[str, str], dict[str, float]] = {
    ("blip2-opt-2.7b", "vqav2"): {"accuracy": 52.3},
    ("blip2-opt-2.7b", "okvqa"): {"accuracy": 31.7},
    ("blip2-opt-2.7b", "gqa"): {"accuracy": 34.6},
    ("blip2-opt-6.7b", "vqav2"): {"accuracy": 52.6},
    ("blip2-opt-6.7b", "okvqa"): {"accuracy": 36.4},
    ("blip2-opt-6.7b", "gqa"): {"accuracy": 36.4},
    ("blip2-flan-t5-xl", "vqav2"): {"accuracy": 63.0},
    ("blip2-flan-t5-xl", "okvqa"): {"accuracy": 40.7},
    ("blip2-flan-t5-xl", "gqa"): {"accuracy": 44.2},
    ("blip2-flan-t5-xxl", "vqav2"): {"accuracy": 65.0},
    ("blip2-flan-t5-xxl", "okvqa"): {"accuracy": 45.9},
    ("blip2-flan-t5-xxl", "gqa"): {"accuracy": 44.7},
}
_RETRIEVAL: dict[tuple[str, str], dict[str, float]] = {
    ("blip2-itm-vit-g-coco", "coco"): {"i2t_r1": 85.4, "t2i_r1": 68.3},
    ("blip2-itm-vit-g-coco", "flickr30k"): {"i2t_r1": 97.6, "t2i_r1": 89.7},
}
TASKS = {"caption": _CAPTION, "vqa": _VQA, "retrieval": _RETRIEVAL}


def published(task: str, model: str, data: str) -> Mapping[str, float]:
    """The paper's values of a model on a data set, by metric; empty where it has none.

    Args:
        model: what the user gave: a preset or hub id matches by its last part.
        data: name or path of the data set; it matches when the paper's name is in it.
    """
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    where = data.lower().replace("-", "").replace("_", "")
    for (their_model, their_data), values in TASKS.get(task, {}).items():
        if name == their_model and their_data in where:
            return values
    return {}
