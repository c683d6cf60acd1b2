"""What is no checkpoint of BLIP-2 says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip2.errors import CheckpointError
from blip2.weights.formats import open_checkpoint


def test_an_adapter_of_peft_says_how_it_is_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"an adapter of PEFT.*merge_and_unload"):
        open_checkpoint(tmp_path)
