"""Towers by name: sizes known offline, counted on the meta device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config

from blip2.models import towers
from blip2.models.language.model import language_model_from_config
from blip2.models.vision.encoder import vision_encoder_from_config

MILLIONS = {
    "efficientnet-lite2": 4.8,
    "dinov2-s": 22.1,
    "vitl": 303.2,
    "vitg": 986.0,
    "minilm-l6": 22.7,
    "bert-base": 109.5,
    "smollm2-135m": 134.5,
    "opt-2.7b": 2651.6,
    "opt-6.7b": 6658.5,
    "vicuna-7b": 6738.4,
    "vicuna-13b": 13015.9,
    "flan-t5-xl": 2849.8,
    "flan-t5-xxl": 11135.3,
}


@pytest.mark.parametrize("name", towers.TOWERS)
def test_parameter_counts_of_the_published_models(name: str) -> None:
    tower = towers.TOWERS[name]
    with torch.device("meta"):
        model: nn.Module
        if tower.kind == "vision":
            model = vision_encoder_from_config(tower.config())
        elif tower.kind == "language":
            model = language_model_from_config(tower.config())
        else:
            from transformers import BertModel

            model = BertModel(tower.config())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.1)


def test_folder_of_a_name_a_hub_id_and_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(towers.TOWERS, "minilm-l6", towers.Tower("bert", lambda: tmp_path, "bert"))
    assert towers.folder("minilm-l6") == str(tmp_path)
    assert towers.folder("opt-2.7b") == "facebook/opt-2.7b"
    assert towers.folder("some/folder") == "some/folder"


def test_flan_t5_runs_with_the_exact_gelu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tower = towers.TOWERS["flan-t5-xl"]
    assert tower.config().dense_act_fn == "gelu"
    T5Config(feed_forward_proj="gated-gelu").save_pretrained(tmp_path)
    monkeypatch.setitem(towers.TOWERS, "flan-t5-xl", replace(tower, source=lambda: tmp_path))
    assert towers.load_part_config(str(tmp_path), "text_config")[0].dense_act_fn == "gelu_new"
    assert towers.load_part_config("flan-t5-xl", "text_config")[0].dense_act_fn == "gelu"
