"""LAVIS's BLIP-2 and InstructBLIP: `.pth` files of `blip2_{qformer,opt,t5,t5_instruct,vicuna_instruct}`."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from blip2.configs import LanguageConfig, QFormerConfig, RunConfig, VisionConfig
from blip2.errors import CheckpointError
from blip2.weights import names
from blip2.weights.checkpoint import (
    INSTRUCT_LANGUAGE,
    INSTRUCT_TEXT,
    OPT_END,
    T5_QUESTION,
    VICUNA_START,
    Checkpoint,
    stored_config,
    stored_json,
)
from blip2.weights.lazy_tensors import LazyTensor, Tensors, open_pickled

# Language models of LAVIS by projection and width, image encoders by width: a `.pth` names neither.
_LAVIS_LANGUAGE = {
    ("opt_proj", 2560): "opt-2.7b",
    ("opt_proj", 4096): "opt-6.7b",
    ("t5_proj", 2048): "flan-t5-xl",
    ("t5_proj", 4096): "flan-t5-xxl",
    ("llm_proj", 4096): "vicuna-7b",
    ("llm_proj", 5120): "vicuna-13b",
}
_LAVIS_VISION = {1408: VisionConfig(name="vitg", layer=-1), 1024: VisionConfig(name="vitl", layer=-2)}
_WORDS = "qformer.embeddings.word.weight"
_KEY = "qformer.layers.0.cross_attention.key.weight"


def open_lavis(path: Path) -> Checkpoint:
    """Open a `.pth`; what it does not say (which towers) follows from its widths.

    Raises:
        CheckpointError: damaged, holding more than tensors and plain values, or of another model.
    """
    theirs, other_entries = open_pickled(path)
    _require_blip2(path, theirs)
    projection = next((p for p in names.LAVIS_PROJECTIONS if f"{p}.weight" in theirs), None)
    vision_names = [n for n in theirs if n.startswith(names.LAVIS_VISION)]
    theirs_by_ours = names.lavis(names.depth_of(theirs), projection or names.LAVIS_PROJECTIONS[0])
    tensors = names.renamed(theirs, theirs_by_ours, (*names.LAVIS_IGNORED, names.LAVIS_VISION), str(path))
    if "temp" in tensors and tensors["temp"].shape == ():
        tensors["temp"] = tensors["temp"].reshaped(1)
    vision = _eva({name: theirs[name] for name in vision_names}, path) if vision_names else {}
    stored = other_entries.get("blip2")
    if isinstance(stored, str):
        run = replace(stored_config(stored, str(path)), init=None)
    else:
        run = _lavis_config(path, tensors, projection, vision)
    settings = other_entries.get("blip2_vision")
    own = stored_json(settings, str(path)) if isinstance(settings, str) else None
    return Checkpoint(str(path), "lavis", run, names.without_batch_axis(tensors), vision, own)


def _require_blip2(path: Path, theirs: Tensors) -> None:
    for part, model in names.LAVIS_OTHERS.items():
        if any(name.startswith(part) for name in theirs):
            raise CheckpointError(f"{path}: a checkpoint of {model}, not of BLIP-2")
    queries = theirs.get("query_tokens")
    if queries is None or len(queries.shape) != 3 or not any(name.startswith("Qformer.") for name in theirs):
        raise CheckpointError(f"{path}: not a LAVIS BLIP-2 checkpoint (no query_tokens and Qformer.* in it)")


def _lavis_config(path: Path, tensors: Tensors, projection: str | None, vision: Tensors) -> RunConfig:
    queries, width = tensors["qformer.query_tokens"].shape[-2:]
    if width != 768 or names.depth_of(tensors) != 12:
        raise CheckpointError(
            f"{path}: its Q-Former is {width} wide with {names.depth_of(tensors)} layers, and LAVIS's only is "
            "BERT-base (768, 12)"
        )
    if _KEY not in tensors:
        raise CheckpointError(f"{path}: {_KEY} is missing: the checkpoint is of another model, or incomplete")
    features = tensors[_KEY].shape[-1]
    if features not in _LAVIS_VISION:
        raise CheckpointError(
            f"{path}: made for an image encoder {features} wide; LAVIS has 1408 (ViT-g), 1024 (ViT-L)"
        )
    encoder = _LAVIS_VISION[features]
    if vision:
        encoder = replace(encoder, image_size=_side(vision["embeddings.position_embedding"].shape[1]))
    language, reader = LanguageConfig(), {}
    if projection is not None:
        hidden = tensors["language_proj.weight"].shape[0]
        name = _LAVIS_LANGUAGE.get((projection, hidden))
        if name is None:
            raise CheckpointError(f"{path}: made for a language model {hidden} wide, which is none of LAVIS's")
        if _WORDS in tensors:
            start = VICUNA_START if projection == "llm_proj" else None
            language, reader = replace(INSTRUCT_LANGUAGE, name=name, start=start), INSTRUCT_TEXT
        elif projection == "llm_proj":
            language = LanguageConfig(name, start=VICUNA_START)
        elif projection == "t5_proj":
            language = LanguageConfig(name, question=T5_QUESTION)
        else:
            language = LanguageConfig(name, end=OPT_END)
    return RunConfig(
        recipe="lavis",
        stage="stage2" if projection else "stage1",
        vision=encoder,
        qformer=QFormerConfig(init="bert-base", queries=queries, attention_dropout=0.1, **reader),
        language=language,
    )


def _eva(theirs: Tensors, path: Path) -> Tensors:
    """EVA ViT-g under the names of `Blip2VisionModel`; the bias of q, k, v becomes cat(q, 0, v)."""
    depth = len({m[1] for name in theirs if (m := re.match(r"visual_encoder\.blocks\.(\d+)\.", name))})
    if not depth:
        raise CheckpointError(f"{path}: its image encoder is not EVA ViT-g; convert a checkpoint without one")
    theirs_by_ours = names.eva(depth)
    biases = tuple(f"visual_encoder.blocks.{n}.attn.{kind}" for n in range(depth) for kind in ("q_bias", "v_bias"))
    tensors = names.renamed(theirs, theirs_by_ours, biases, str(path))
    missing = [name for name in (*theirs_by_ours.values(), *biases) if name not in theirs]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing ({len(missing)} such): its image encoder is incomplete")
    for n in range(depth):
        q, v = (theirs[f"visual_encoder.blocks.{n}.attn.{kind}"] for kind in ("q_bias", "v_bias"))

        def join(q: LazyTensor = q, v: LazyTensor = v) -> torch.Tensor:
            return torch.cat([q.read(), torch.zeros(q.shape, dtype=q.dtype), v.read()])

        tensors[f"encoder.layers.{n}.self_attn.qkv.bias"] = LazyTensor((3 * q.shape[0],), q.dtype, join)
    return tensors


def _side(positions: int) -> int:
    """Pixels of the side of an image with so many positions, [CLS] included, in patches of 14."""
    return 14 * math.isqrt(positions - 1)
