"""Damaged, cut short, foreign and dangerous checkpoints: one line that names the file, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import blip2
from blip2.cli.main import main
from blip2.errors import CheckpointError, ConfigError
from blip2.weights.formats import open_checkpoint
from blip2.weights.lazy_tensors import INDEX, LazyTensor, open_folder, read_metadata, write_folder

HF = Callable[[str], tuple[Path, Any]]


class Dangerous:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.fixture
def converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """`converted(source, message, to)`: convert says it in one line of its own, and what it began is gone."""

    def check(source: Path, message: str, to: str = "blip2") -> None:
        capsys.readouterr()
        before = sorted(p.name for p in tmp_path.rglob("*"))
        assert main(["convert", str(source), str(tmp_path / f"target{'.pth' * (to == 'lavis')}"), "--to", to]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("blip2: ")]
        assert len(lines) == 1, lines
        assert str(source) in lines[0]
        assert message in lines[0]
        assert sorted(p.name for p in tmp_path.rglob("*")) == before

    return check


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path | str, str], None]:
    """`refused(source, message)`: convert and caption both say it in one line, and write nothing."""

    def check(source: Path | str, message: str) -> None:
        capsys.readouterr()
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
Converted = Callable[..., None]


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


@pytest.mark.parametrize("text", ["null", "[1, 2]", "{}", "", '{"model_type": 3}'])
def test_configs_that_say_nothing(folder: Path, refused: Refused, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "not a folder that transformers can load")


@pytest.mark.parametrize(
    ("part", "setting", "value", "message"),
    [
        ("qformer_config", "hidden_size", "wide", "not a folder that transformers can load"),
        ("qformer_config", "num_attention_heads", 5, ": 24 wide, which 5 heads do not divide"),
        ("qformer_config", "num_hidden_layers", 7, "qformer.layers.3.self_attention.query.weight is missing"),
        ("qformer_config", "cross_attention_frequency", 1, "qformer.layers.1.cross_attention.query.weight is missing"),
        ("qformer_config", "hidden_dropout_prob", 3, "its configuration cannot be used: qformer.dropout is 3"),
        ("vision_config", "num_hidden_layers", 3, "encoder.layers.2."),
        ("vision_config", "hidden_size", 64, "embeddings.class_embedding of its image encoder is (1, 1, 32), and"),
        ("text_config", "num_hidden_layers", 3, "weights of OPTForCausalLM are missing"),
        ("text_config", "ffn_dim", 44, "of its language model is ("),
        ("text_config", "model_type", "unheard", "not a folder that transformers can load"),
    ],
)
def test_a_config_that_its_weights_contradict(
    folder: Path, converted: Converted, part: str, setting: str, value: object, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part][setting] = value
    (folder / "config.json").write_text(json.dumps(config))
    converted(folder, message)


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors file in place, its metadata kept."""
    tensors, metadata = load_file(file), read_metadata(file)
    change(tensors)
    save_file(tensors, file, metadata)


def test_a_tensor_too_many_and_too_few(folder: Path, refused: Refused, converted: Converted) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    changed(file, lambda state: state.update({"qformer.encoder.extra": torch.zeros(1)}))
    refused(folder, "qformer.encoder.extra is no tensor of BLIP-2 (1 such)")
    file.write_bytes(whole)
    changed(file, lambda state: state.pop("qformer.layernorm.weight"))
    refused(folder, "qformer.embedding_norm.weight is missing: the checkpoint is of another model or stage")
    file.write_bytes(whole)
    changed(file, lambda state: state.pop("vision_model.encoder.layers.1.mlp.fc1.bias"))
    converted(folder, "encoder.layers.1.mlp.fc1.bias of its image encoder is missing (1 such)")
    file.write_bytes(whole)
    changed(file, lambda state: state.pop("language_model.model.decoder.layers.1.fc1.weight"))
    converted(folder, "1 weights of OPTForCausalLM are missing, the first is model.decoder.layers.1.fc1.weight")


@pytest.mark.parametrize("to", ["blip2", "hf", "lavis"])
def test_a_run_of_ours_that_is_not_whole(hf: HF, tmp_path: Path, converted: Converted, to: str) -> None:
    blip2.convert(hf("opt")[0], tmp_path / "run", "blip2")
    file = tmp_path / "run" / "model.safetensors"
    whole = file.read_bytes()
    changed(file, lambda state: state.pop("qformer.embedding_norm.weight"))
    converted(tmp_path / "run", "qformer.embedding_norm.weight is missing", to)
    file.write_bytes(whole)
    changed(file, lambda state: state.update(more=torch.zeros(1)))
    converted(tmp_path / "run", "more has no place in this model", to)
    file.write_bytes(whole)
    if to != "blip2":  # which leaves the towers where they are
        changed(tmp_path / "run/vision/model.safetensors", lambda state: state.pop("embeddings.class_embedding"))
        converted(tmp_path / "run", "embeddings.class_embedding of its image encoder is missing", to)


@pytest.mark.parametrize("stored", ["{", "null", "[1]"])
def test_a_configuration_in_a_header_that_is_none(hf: HF, tmp_path: Path, refused: Refused, stored: str) -> None:
    blip2.convert(hf("itm")[0], tmp_path / "run", "blip2")
    blip2.convert(tmp_path / "run", tmp_path / "hf", "hf")
    for file in (tmp_path / "run/model.safetensors", tmp_path / "hf/blip2.safetensors"):
        save_file(load_file(file), file, {"format": "blip2", "config": stored})
    message = "run/model.safetensors: the configuration stored in it cannot be read"
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_checkpoint(tmp_path / "run")
    refused(tmp_path / "hf", "blip2.safetensors: the configuration stored in it cannot be read")


def test_a_folder_without_tokenizer(folder: Path, converted: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    picture = folder.parent / "x.png"
    Image.new("RGB", (9, 9)).save(picture)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    for to in ("blip2", "hf"):
        converted(folder, "no tokenizer in it", to)
    assert main(["caption", str(picture), "--model", str(folder)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"blip2: {folder}: no tokenizer in it: copy its files there"
    (folder / "tokenizer.json").write_text("{")
    assert main(["caption", str(picture), "--model", str(folder)]) == 2
    assert f"blip2: {folder}: its tokenizer cannot be read (" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pickled(hf: HF, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is in a LAVIS file of ours, with its image encoder."""
    home = tmp_path_factory.mktemp("lavis")
    blip2.convert(hf("itm")[0], home / "itm.pth", "lavis")
    found: dict[str, Any] = torch.load(home / "itm.pth", weights_only=True)
    return found


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query_tokens", torch.zeros(4), "not a LAVIS BLIP-2 checkpoint"),
        ("temp", torch.zeros(3), "temp is (3,) in the checkpoint and (1,) in the model"),
        ("ln_vision.weight", None, "ln_vision.weight is missing"),
        ("ln_vision.weight", torch.zeros(32, dtype=torch.int64), "ln_vision.weight is of type int64, not a float"),
        ("ln_vision.weight", torch.zeros(32, dtype=torch.complex64), "ln_vision.weight is of a type that is not"),
        ("Qformer.bert.encoder.layer.1.output.dense.weight", None, "qformer.layers.1.text_ff.down.weight is missing"),
        ("Qformer.bert.encoder.layer.1.output.dense.weight", torch.zeros(2, 2), "text_ff.down.weight is (2, 2) in"),
        ("Qformer.bert.encoder.layer.99999999999.x", torch.zeros(1), "layer.99999999999.x is no tensor of BLIP-2"),
        ("visual_encoder.blocks.1.attn.q_bias", None, "blocks.1.attn.q_bias is missing (1 such): its image encoder"),
        ("visual_encoder.pos_embed", None, "visual_encoder.pos_embed is missing"),
        ("visual_encoder.blocks.x.norm1", torch.zeros(1), "visual_encoder.blocks.x.norm1 is no tensor of BLIP-2"),
    ],
)
def test_lavis_files_that_are_not_whole(
    pickled: dict[str, Any], tmp_path: Path, converted: Converted, name: str, value: Any, message: str
) -> None:
    model = {n: v for n, v in pickled["model"].items() if n != name} | ({} if value is None else {name: value})
    torch.save(pickled | {"model": model}, tmp_path / "x.pth")
    converted(tmp_path / "x.pth", message)


@pytest.mark.parametrize("beside", ["blip2", "blip2_vision"])
@pytest.mark.parametrize("stored", ["{", "[1]", "null"])
def test_settings_in_a_lavis_file_that_are_none(
    pickled: dict[str, Any], tmp_path: Path, refused: Refused, beside: str, stored: str
) -> None:
    torch.save(pickled | {beside: stored}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "x.pth: the configuration stored in it cannot be read")


def test_a_published_lavis_file_without_cross_attention(tmp_path: Path, refused: Refused) -> None:
    layer = "Qformer.bert.encoder.layer"
    tensors = {f"{layer}.{n}.attention.self.query.weight": torch.zeros(1) for n in range(12)}
    torch.save({"model": {"query_tokens": torch.zeros(1, 32, 768), **tensors}}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "cross_attention.key.weight is missing: the checkpoint is of another model, or")


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
    torch.save({"model": {"query_tokens": torch.zeros(1, 2, 3), "unet.weight": torch.zeros(2, 2)}}, path)
    refused(path, "a checkpoint of BLIP-Diffusion, not of BLIP-2")
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
    refused("someone/blip2-none", "cannot be downloaded from the hub")


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
