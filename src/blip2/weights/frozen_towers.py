"""The frozen towers of a checkpoint as folders of transformers: config, tensors, tokenizer files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blip2.configs import RunConfig
from blip2.data.tokenizers import QFORMER_TOKENIZER
from blip2.errors import CheckpointError
from blip2.models import towers
from blip2.models.freezing import freeze
from blip2.models.language.model import auto_class, load_language_model
from blip2.models.vision.encoder import VisionEncoder, vision_encoder_from_config
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.lazy_tensors import LazyTensor, Tensors, open_folder

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Tower:
    """A frozen model: its transformers config, its tensors, and the folder they are in (None: in the checkpoint)."""

    config: Any
    tensors: Tensors
    folder: Path | None


def folder_of(name: str) -> Path:
    """Local folder of a tower's name, folder or hub id; downloaded where it is not there."""
    source = towers.folder(name)
    if Path(source).is_dir():
        return Path(source)
    if not towers.is_id(source):
        raise CheckpointError(f"{name}: no such folder, and no hub id (OWNER/NAME)")
    return towers.snapshot(source)


def text_folder(folder: Path) -> Path:
    """Where a folder keeps the tokenizer of its Q-Former's text: InstructBLIP has two, in folders of their own."""
    own = folder / QFORMER_TOKENIZER
    return own if own.is_dir() else folder


def vision_tower(checkpoint: Checkpoint) -> Tower:
    """The image encoder of a checkpoint, under the names of its own transformers class."""
    settings = checkpoint.config.vision
    if checkpoint.vision:
        norm = {f"post_layernorm.{k}": checkpoint.tensors[f"ln_vision.{k}"] for k in ("weight", "bias")}
        config = eva_config(checkpoint)
        _require_complete(checkpoint.source, config, checkpoint.vision | norm)
        return Tower(config, checkpoint.vision | norm, None)
    folder = folder_of(settings.name)
    part, inside = towers.load_part_config(str(folder), "vision_config")
    tensors = open_folder(folder)
    if inside:
        tensors = _under(tensors, "vision_model.")
    if part.model_type == "blip_2_vision_model":
        _require_complete(str(folder), part, tensors)
    return Tower(part, tensors, folder)


def with_own_encoder(checkpoint: Checkpoint) -> Checkpoint:
    """A run of ours that fine-tuned its image encoder as one that brings it along; any other as it is.

    Raises:
        CheckpointError: the encoder is none that `Blip2VisionModel` can hold.
    """
    prefix = "vision.model."
    own = {name.removeprefix(prefix): lazy for name, lazy in checkpoint.tensors.items() if name.startswith(prefix)}
    if not own:
        return checkpoint
    part, _ = towers.load_part_config(str(folder_of(checkpoint.config.vision.name)), "vision_config")
    if part.model_type != "blip_2_vision_model":
        raise CheckpointError(
            f"{checkpoint.source}: it fine-tuned a {part.model_type} image encoder, and BLIP-2 of transformers and "
            "LAVIS has place for its own ViT-g only"
        )
    rest = {name: lazy for name, lazy in checkpoint.tensors.items() if not name.startswith(prefix)}
    own = {name: lazy for name, lazy in own.items() if not name.startswith("post_layernorm.")}
    config = replace(checkpoint.config, vision=replace(checkpoint.config.vision, train=False))
    return replace(checkpoint, tensors=rest, vision=own, vision_config=part.to_dict(), config=config)


def language_tower(config: RunConfig) -> Tower:
    """The language model of a run, under the names of its own transformers class.

    Read from its files where their names are those of the class as it is now, else loaded whole.
    """
    folder = folder_of(config.language.name)
    part, inside = towers.load_part_config(config.language.name, "text_config")
    tensors = open_folder(folder)
    if inside:
        tensors = _under(tensors, "language_model.")
    shapes, tied = _shapes_of(part)
    if tensors.keys() <= shapes.keys() and shapes.keys() - tensors.keys() <= tied:
        _require_shapes(str(folder), "language model", shapes, tensors)
        return Tower(part, tensors, folder)
    if not tensors:
        raise CheckpointError(f"{folder}: no language model in it")
    dtype = next(iter(tensors.values())).dtype
    model = load_language_model(replace(config.language, quantize=None), dtype).model
    return Tower(part, without_tied(model.state_dict()), folder)


def language_config(name: str) -> Any:
    """transformers config of a language model by name, folder or hub id; a named one needs no hub."""
    if name in towers.TOWERS:
        return towers.TOWERS[name].config()
    return towers.load_part_config(str(folder_of(name)), "text_config")[0]


def eva_config(checkpoint: Checkpoint) -> Any:
    """Config of the `Blip2VisionModel` that came along in a LAVIS file.

    EVA ViT-g but for the sizes that the tensors show; a file of ours says its own.
    """
    from transformers import Blip2VisionConfig

    if checkpoint.vision_config is not None:
        with towers.readable(checkpoint.source):
            return Blip2VisionConfig(**checkpoint.vision_config)
    vision = checkpoint.vision
    config = towers.TOWERS["vitg"].config()
    config.hidden_size = vision["embeddings.class_embedding"].shape[-1]
    config.num_hidden_layers = sum(name.endswith("self_attn.qkv.weight") for name in vision)
    config.intermediate_size = vision["encoder.layers.0.mlp.fc1.weight"].shape[0]
    config.patch_size = vision["embeddings.patch_embedding.weight"].shape[-1]
    config.image_size = config.patch_size * math.isqrt(vision["embeddings.position_embedding"].shape[1] - 1)
    return config


def eva_encoder(checkpoint: Checkpoint, dtype: torch.dtype) -> VisionEncoder:
    """The frozen image encoder that came along in a LAVIS file.

    Raises:
        CheckpointError: a tensor of it is missing or of another shape.
    """
    settings, tower = checkpoint.config.vision, vision_tower(checkpoint)
    encoder = vision_encoder_from_config(
        tower.config, layer=settings.layer, pool=settings.pool, size=settings.image_size, name=checkpoint.source
    ).to(dtype)
    with torch.no_grad():
        for name, value in encoder.model.state_dict().items():
            value.copy_(tower.tensors[name].read())
    freeze(encoder)
    return encoder


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of a folder.

    Raises:
        CheckpointError: it has none.
    """
    require_tokenizer(source)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def require_tokenizer(folder: Path) -> None:
    """Refuse a folder without tokenizer, for which transformers makes up an empty one."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(f"{folder}: no tokenizer in it ({', '.join(VOCABULARIES)}): copy its files there")


def without_tied(state: dict[str, torch.Tensor]) -> Tensors:
    """Tensors of a loaded model, the first name of each that has several (tied weights)."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    out: Tensors = {}
    for name, value in state.items():
        if seen.setdefault((value.data_ptr(), tuple(value.shape)), name) == name:
            out[name] = LazyTensor.of(value)
    return out


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): lazy for name, lazy in tensors.items() if name.startswith(prefix)}


def _require_complete(source: str, vision: Any, tensors: Tensors) -> None:
    """Every tensor of the image encoder is there; what is there besides does no harm."""
    from transformers import Blip2VisionModel

    with torch.device("meta"), towers.readable(source):
        model: Any = Blip2VisionModel(vision)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise CheckpointError(f"{source}: {missing[0]} of its image encoder is missing ({len(missing)} such)")
    _require_shapes(source, "image encoder", shapes, tensors)


def _require_shapes(source: str, what: str, shapes: dict[str, tuple[int, ...]], tensors: Tensors) -> None:
    wrong = next((n for n, lazy in tensors.items() if n in shapes and lazy.shape != shapes[n]), None)
    if wrong is not None:
        raise CheckpointError(
            f"{source}: {wrong} of its {what} is {tensors[wrong].shape}, and {shapes[wrong]} by its configuration"
        )


def empty_language_model(config: Any) -> Any:
    """The transformers language model of a config, without memory."""
    with torch.device("meta"), towers.quiet():
        return auto_class(config).from_config(config)


def _shapes_of(config: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """(shapes of all tensors, names of those that are tied to another) of a language model of this config."""
    model = empty_language_model(config)
    tied: Iterable[str] = getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ()
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}, set(tied)
