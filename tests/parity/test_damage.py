"""Damaged, cut short, foreign and dangerous checkpoints: one line that names the file, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2.apps.cli import main
from blip2.weights.tensors import INDEX, LazyTensor, open_folder, write_folder

HF = Callable[[str], tuple[Path, Any]]


class Dangerous:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path | str, str], None]:
    """`refused(source, message)`: convert and caption both say it in one line, and write nothing."""

    def check(source: Path | str, message: str) -> None:
        before = sorted(p.name for p in tmp_path.rglob("*"))
        picture = tmp_path.parent / f"{tmp_path.name}.png"
        if not picture.exists():
            from PIL import Image

            Image.new("RGB", (9, 9)).save(picture)
        for command in (
            ["convert", str(source), str(tmp_path / "target"), "--to", "blip2"],
            ["caption", str(picture), "--model", str(source)],
        ):
            assert main(command) == 2
            lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
            assert [line for line in lines if line.startswith("blip2: ")] == lines, lines
            assert len(lines) == 1
            assert str(source) in lines[0]
            assert message in lines[0]
        assert sorted(p.name for p in tmp_path.rglob("*")) == before

    return check


Refused = Callable[[Path | str, str], None]


@pytest.fixture
def folder(hf: HF, tmp_path: Path) -> Path:
    """A Hugging Face folder that may be damaged."""
    return Path(shutil.copytree(hf("opt")[0], tmp_path / "hf"))


def test_cut_short_safetensors(folder: Path, refused: Refused) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "model.safetensors: cannot be read as safetensors: it is cut short")


def test_broken_header(folder: Path, refused: Refused) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    refused(folder, "model.safetensors: cannot be read as safetensors")


def test_half_downloaded(folder: Path, refused: Refused) -> None:
    tensors = {name: LazyTensor.of(lazy.read().clone()) for name, lazy in open_folder(folder).items()}
    (folder / "model.safetensors").unlink()
    write_folder(folder, tensors, shard_bytes=20_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    refused(folder, f"{shards[1].name}: cannot be read as safetensors: it is cut short")
    shards[1].unlink()
    refused(folder, f"{shards[1].name}: 1 of {len(shards)} shards are missing")
    shards[1].write_bytes(whole)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["query_tokens"] = next(
        file for file in index["weight_map"].values() if file != index["weight_map"]["query_tokens"]
    )
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "query_tokens is missing, which model.safetensors.index.json says it holds")
    (folder / INDEX).write_text("{")
    refused(folder, "model.safetensors.index.json: not an index of shards")


def test_no_weights(folder: Path, refused: Refused) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights in it")


def test_configs_of_other_things(folder: Path, refused: Refused) -> None:
    (folder / "config.json").write_text("{not json")
    refused(folder, "not a folder that transformers can load")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(folder, "a bert model, not a BLIP-2 one")


def test_a_tensor_too_many_and_too_few(folder: Path, refused: Refused) -> None:
    tensors = {name: LazyTensor.of(lazy.read().clone()) for name, lazy in open_folder(folder).items()}
    write_folder(folder, tensors | {"qformer.encoder.extra": LazyTensor.of(torch.zeros(1))})
    refused(folder, "qformer.encoder.extra is no tensor of BLIP-2 (1 such)")


def test_a_pickle_with_objects_runs_nothing(tmp_path: Path, refused: Refused) -> None:
    victim = tmp_path.parent / f"{tmp_path.name}-victim"
    torch.save({"model": {"query_tokens": torch.zeros(1)}, "extra": Dangerous(victim)}, tmp_path / "x.pth")
    assert not victim.exists()
    refused(tmp_path / "x.pth", "holds Python objects besides tensors")
    assert not victim.exists()


def test_files_that_are_no_pickles(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": {"query_tokens": torch.zeros(100, 100)}}, path)
    path.write_bytes(path.read_bytes()[:-300])
    refused(path, "not a whole file of torch.save (cut short or damaged)")
    path.write_bytes(bytes(range(256)) * 4)
    refused(path, "torch.save")
    path.write_bytes(b"")
    refused(path, "torch.save")


def test_lavis_files_of_other_models(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": {"query_tokens": torch.zeros(1, 2, 3), "llm_proj.weight": torch.zeros(2, 2)}}, path)
    refused(path, "a checkpoint of InstructBLIP, not of BLIP-2")
    torch.save({"model": {"head.weight": torch.zeros(2)}}, path)
    refused(path, "not a LAVIS BLIP-2 checkpoint (no query_tokens and Qformer.* in it)")
    layer = "Qformer.bert.encoder.layer"
    names = {f"{layer}.{n}.attention.self.query.weight": torch.zeros(768, 768) for n in range(12)}
    cross = {f"{layer}.0.crossattention.self.key.weight": torch.zeros(768, 123)}
    torch.save({"model": {"query_tokens": torch.zeros(1, 32, 768), **names, **cross}}, path)
    refused(path, "made for an image encoder 123 wide; LAVIS has 1408 (ViT-g), 1024 (ViT-L)")


def test_a_bare_qformer(hf: HF, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Blip2QFormerModel

    config = hf("itm")[1].config.qformer_config
    Blip2QFormerModel(config).save_pretrained(tmp_path / "q")
    capsys.readouterr()
    refused(tmp_path / "q", "a Q-Former alone")


def test_names_that_lead_nowhere(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("blip2-opt-99b", "no such run folder or checkpoint file, and no preset")
    refused("someone/blip2-none", "cannot be had from the hub")


def test_the_wrong_towers_name_both_widths(hf: HF, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image
    from transformers import OPTConfig, OPTForCausalLM

    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    other = tmp_path / "lm"
    sizes = {"hidden_size": 12, "word_embed_proj_dim": 12, "ffn_dim": 24, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(vocab_size=400, num_hidden_layers=1, **sizes)).save_pretrained(other)
    for file in hf("opt")[0].glob("tokenizer*"):
        shutil.copy(file, other)
    capsys.readouterr()
    source = str(hf("opt")[0])
    assert main(["caption", str(tmp_path / "x.png"), "--model", source, "--language", str(other)]) == 2
    assert "made for a language model 20 wide, this model's is 12 wide" in capsys.readouterr().err
