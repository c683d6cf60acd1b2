"""Our weights files: strict loading, and what the hand-over from stage 1 to stage 2 may leave out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from blip2.configs import LoraConfig
from blip2.errors import CheckpointError
from blip2.models.freezing import freeze, is_adapter
from blip2.models.language.model import language_model_from_config
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.weights import lazy_tensors, runs
from blip2.weights.lazy_tensors import lazily, read_metadata, read_safetensors, write_safetensors
from blip2.weights.loading import STAGE1_ONLY, STAGE2_ONLY, Allowed, LoadReport, fill, new_adapters, trained_state

LLAMA = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def qformer(*, text: bool, queries: int = 3, image_width: int = 6) -> QFormer:
    sizes = {"width": 8, "depth": 2, "heads": 2, "inner": 12, "positions": 9}
    return QFormer(**sizes, image_width=image_width, queries=queries, vocab=13 if text else None)


def stage1(queries: int = 3, image_width: int = 6) -> Stage1:
    vision = nn.Linear(2, 2)
    freeze(vision)
    return Stage1(qformer(text=True, queries=queries, image_width=image_width), vision, embed_dim=4)


def stage2(queries: int = 3, image_width: int = 6) -> Stage2:
    vision = nn.Linear(2, 2)
    freeze(vision)
    return Stage2(
        qformer(text=False, queries=queries, image_width=image_width), language_model_from_config(LLAMA), vision
    )


def adapted(rank: int = 2, **settings: str) -> Stage2:
    """A stage 2 with adapters that are not at their start; skips where peft is absent."""
    pytest.importorskip("peft", reason="peft is not installed")
    from blip2.models.language.lora import add_lora

    model = stage2()
    add_lora(model.language_model, LoraConfig(rank=rank, **settings))
    with torch.no_grad():
        for p in model.language_model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))
    return model


def save(path: Path, model: nn.Module, config: dict[str, object]) -> None:
    runs.write_weights(path, lazily(trained_state(model)), config)


def load(model: nn.Module, path: Path) -> LoadReport:
    return fill(model, str(path), read_safetensors(path))


def hand_over(model: Stage2, path: Path) -> LoadReport:
    """As a stage 2 starts from a stage 1."""
    return fill(model, str(path), read_safetensors(path), Allowed(left_out=STAGE1_ONLY, fresh=STAGE2_ONLY))


def go_on_from(model: Stage2, path: Path) -> LoadReport:
    """As a run starts from a checkpoint of its own stage."""
    state = read_safetensors(path)
    return fill(model, str(path), state, Allowed(fresh=new_adapters(state)))


def changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a weights file with its tensors changed."""
    state = read_safetensors(path)
    change(state)
    save_file(state, path.with_name("changed.safetensors"))
    return path.with_name("changed.safetensors")


@pytest.fixture
def first(tmp_path: Path) -> tuple[Stage1, Path]:
    """A stage 1 and its file."""
    model, path = stage1(), tmp_path / "stage1.safetensors"
    save(path, model, {"recipe": "tiny/stage1"})
    return model, path


def test_what_trains_is_saved_and_frozen_towers_are_not(first: tuple[Stage1, Path]) -> None:
    model, path = first
    saved = read_safetensors(path)
    assert set(saved) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "vision_proj.weight" in saved
    assert not any(name.startswith("vision.") for name in saved)
    assert all(torch.equal(saved[name], value) for name, value in trained_state(model).items())


def test_the_configuration_is_in_the_header(first: tuple[Stage1, Path]) -> None:
    metadata = read_metadata(first[1])
    assert metadata["format"] == "blip2"
    assert json.loads(metadata["config"]) == {"recipe": "tiny/stage1"}


def test_a_file_without_metadata_has_none(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    assert read_metadata(tmp_path / "bare.safetensors") == {}


def test_round_trip_is_exact_and_leaves_frozen_towers_alone(first: tuple[Stage1, Path]) -> None:
    model, path = first
    other = stage1()
    vision = other.vision.weight.clone()
    report = load(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.qformer.parameters(), other.qformer.parameters(), strict=True))
    assert torch.equal(model.temp, other.temp)
    assert torch.equal(other.vision.weight, vision)
    assert (report.left_out, report.fresh) == ((), ())
    assert report.line() == f"{report.loaded} tensors from {path}"
    assert report.loaded == len(read_safetensors(path))


def test_parameters_keep_their_identity_and_train_on(first: tuple[Stage1, Path]) -> None:
    other = stage1()
    before = other.temp
    load(other, first[1])
    assert other.temp is before
    assert other.temp.requires_grad


@pytest.mark.parametrize("name", ["temp", "qformer.query_tokens", "qformer.layers.1.text_ff.up.bias"])
def test_a_missing_tensor_is_named(first: tuple[Stage1, Path], name: str) -> None:
    path = changed(first[1], lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=rf"changed.safetensors: {name} is missing: the checkpoint is of another"):
        load(stage1(), path)


@pytest.mark.parametrize("name", ["language_proj.weight", "qformer.layers.7.query_ff.up.bias", "ema.temp"])
def test_an_extra_tensor_is_named(first: tuple[Stage1, Path], name: str) -> None:
    path = changed(first[1], lambda state: state.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=rf"changed.safetensors: {name} has no place in this model"):
        load(stage1(), path)


def test_a_wrong_shape_names_both_sides_and_changes_nothing(first: tuple[Stage1, Path]) -> None:
    other = stage1(queries=5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(other, first[1])
    assert "qformer.query_tokens is (3, 8) in the checkpoint and (5, 8) in the model: use the same" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_hand_over_takes_the_query_side(first: tuple[Stage1, Path]) -> None:
    one, path = first
    two = stage2()
    fresh, language = two.language_proj.weight.clone(), two.language_model.embed(torch.arange(20)).clone()
    report = hand_over(two, path)
    state = one.state_dict()
    for name, value in trained_state(two).items():
        if not name.startswith("language_proj."):
            assert torch.equal(value, state[name]), name
    assert torch.equal(two.language_proj.weight, fresh)
    assert torch.equal(two.language_model.embed(torch.arange(20)), language)
    assert set(report.fresh) == {"language_proj.weight", "language_proj.bias"}


def test_hand_over_leaves_out_what_is_stage_1s_alone(first: tuple[Stage1, Path]) -> None:
    """The list, worked out by hand for two layers."""
    report = hand_over(stage2(), first[1])
    parts = {".".join(name.split(".")[:4] if "text_ff" in name else name.split(".")[:2]) for name in report.left_out}
    assert parts == {
        "temp",
        "vision_proj.weight",
        "vision_proj.bias",
        "text_proj.weight",
        "text_proj.bias",
        "itm_head.weight",
        "itm_head.bias",
        "qformer.embeddings",
        "qformer.head",
        "qformer.layers.0.text_ff",
        "qformer.layers.1.text_ff",
    }
    assert report.line() == (
        f"{report.loaded} tensors from {first[1]}; {len(report.left_out)} left out "
        "(itm_head, text branch, temp, text_proj, vision_proj); 2 start fresh (language_proj)"
    )


def test_the_two_stages_give_the_same_query_outputs(first: tuple[Stage1, Path]) -> None:
    one, path = first
    two = stage2().eval()
    one.eval()
    hand_over(two, path)
    kv = one.project_image(torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(two.qformer.encode_queries(kv)[0], one.qformer.encode_queries(kv)[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qformer.query_tokens", "qformer.query_tokens is missing"),
        ("ln_vision.bias", "ln_vision.bias is missing"),
        ("qformer.embedding_norm.weight", "qformer.embedding_norm.weight is missing"),
        ("qformer.layers.0.query_ff.up.weight", "qformer.layers.0.query_ff.up.weight is missing"),
    ],
)
def test_hand_over_wants_the_rest(first: tuple[Stage1, Path], name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        hand_over(stage2(), changed(first[1], lambda state: state.pop(name)))


@pytest.mark.parametrize(
    "name", ["momentum.temp", "qformer.layers.2.query_ff.up.weight", "vision.layer.weight", "qformer.extra", "tempered"]
)
def test_hand_over_leaves_nothing_else_out(first: tuple[Stage1, Path], name: str) -> None:
    path = changed(first[1], lambda state: state.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=rf"{name} has no place in this model"):
        hand_over(stage2(), path)


def test_hand_over_refuses_another_encoder(first: tuple[Stage1, Path]) -> None:
    with pytest.raises(CheckpointError, match="made for an image encoder 6 wide, this model.s is 7 wide"):
        hand_over(stage2(image_width=7), first[1])


@pytest.mark.parametrize("read", [read_safetensors, read_metadata])
@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95 a pickle", b"\xff" * 100, None])
def test_a_file_of_another_kind_is_one_line(
    tmp_path: Path, read: Callable[[Path], object], content: bytes | None
) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value).startswith(
        f"{path}: {'cannot be read as safetensors: ' if content is not None else 'no such file'}"
    )
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_one_line(first: tuple[Stage1, Path]) -> None:
    path = first[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load(stage1(), path)


def test_writing_replaces_or_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, lazily({"x": torch.ones(2)}))
    write_safetensors(path, lazily({"x": torch.ones(3).expand(2, 3)}))  # what is not contiguous is written as it reads
    assert torch.equal(read_safetensors(path)["x"], torch.ones(2, 3))

    def full(tensor: Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lazy_tensors, "to_numpy", full)
    with pytest.raises(CheckpointError, match=r"x.safetensors: cannot be written: No space left on device$"):
        write_safetensors(path, lazily({"x": torch.zeros(1)}))
    assert torch.equal(read_safetensors(path)["x"], torch.ones(2, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone/x.safetensors: cannot be written: .*No such file or directory"):
        write_safetensors(tmp_path / "gone" / "x.safetensors", lazily({"x": torch.zeros(1)}))


def test_adapters_are_saved_and_loaded_with_what_trains(tmp_path: Path) -> None:
    model, other, path = adapted(), adapted(), tmp_path / "s2.safetensors"
    save(path, model, {})
    saved = read_safetensors(path)
    assert set(saved) == {n for n, p in model.named_parameters() if p.requires_grad}
    ours = [name for name in saved if is_adapter(name)]
    assert len(ours) == 4  # two matrices beside the query and the value projection of one block
    assert {name.split(".")[0] for name in ours} == {"language_model"}
    frozen = {n: p.clone() for n, p in other.language_model.named_parameters() if not is_adapter(n)}
    assert load(other, path).fresh == ()
    assert all(torch.equal(trained_state(other)[name], value) for name, value in saved.items())
    assert all(torch.equal(p, frozen[n]) for n, p in other.language_model.named_parameters() if n in frozen)


def test_adapters_of_another_run_are_refused_in_one_line(tmp_path: Path) -> None:
    plain, two = tmp_path / "plain.safetensors", tmp_path / "two.safetensors"
    save(plain, stage2(), {})
    save(two, adapted(2), {})
    first = r"language_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight"
    cases = [
        (stage2(), two, rf"two.safetensors: {first} has no place in this model: give lora.rank and lora.targets"),
        (adapted(3), two, rf"two.safetensors: {first} is \(2, 16\) .* \(3, 16\) in the model: use the same lora.rank$"),
        (adapted(2), plain, rf"plain.safetensors: {first} is missing: the checkpoint has no LoRA adapter there$"),
        (adapted(2, targets="o_proj"), two, r"o_proj.lora_A.default.weight is missing: the checkpoint has no LoRA"),
    ]
    for model, path, message in cases:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message) as caught:
            load(model, path)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="o_proj.lora_A.default.weight is missing"):
        go_on_from(adapted(2, targets="o_proj"), two)


def test_adapters_may_be_new_where_a_run_starts(first: tuple[Stage1, Path], tmp_path: Path) -> None:
    plain, model = tmp_path / "plain.safetensors", adapted()
    save(plain, stage2(), {})
    report = go_on_from(model, plain)
    assert len(report.fresh) == 4
    assert report.line().endswith("; 4 start fresh (LoRA adapters)")
    assert torch.equal(model.language_proj.weight, read_safetensors(plain)["language_proj.weight"])
    report = hand_over(adapted(), first[1])
    assert report.line().endswith("; 6 start fresh (language_proj, LoRA adapters)")
    assert go_on_from(stage2(), plain).fresh == ()


def test_an_encoder_that_is_about_to_train_is_not_called_fresh() -> None:
    report = LoadReport("run", 3, fresh=("vision.model.a", "vision.model.b"))
    assert report.line() == "3 tensors from run; image encoder as it was pretrained"
    report = LoadReport("run", 3, fresh=("vision.model.a", "language_proj.weight"))
    assert report.line() == "3 tensors from run; 1 start fresh (language_proj); image encoder as it was pretrained"
