"""Open any BLIP-2 checkpoint: a run of ours, a Hugging Face folder or hub id, a LAVIS `.pth`.

    found = open_checkpoint("Salesforce/blip2-opt-2.7b")
    found.config        # the RunConfig that builds its model
    found.tensors       # what trains, under our names, still on disk

Nothing is read here but names and shapes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from blip2.configs import LanguageConfig, QFormerConfig, RunConfig, VisionConfig, from_dict
from blip2.errors import CheckpointError
from blip2.models import hub
from blip2.weights import names, runs
from blip2.weights.loading import STAGE2_ONLY, Allowed
from blip2.weights.tensors import Tensors, open_folder, open_pickled, open_safetensors

Format = Literal["blip2", "hf", "lavis"]

# Published checkpoints by a short name.
PRESETS = {
    name: f"Salesforce/{name}"
    for name in (
        "blip2-opt-2.7b",
        "blip2-opt-6.7b",
        "blip2-opt-2.7b-coco",
        "blip2-opt-6.7b-coco",
        "blip2-flan-t5-xl",
        "blip2-flan-t5-xl-coco",
        "blip2-flan-t5-xxl",
        "blip2-itm-vit-g",
        "blip2-itm-vit-g-coco",
    )
}
# Our tensors that transformers has no place for, beside the folder's own weights.
SIDE_FILE = "blip2.safetensors"
# Language models of LAVIS by projection and width, image encoders by width: a `.pth` names neither.
_LAVIS_LANGUAGE = {
    ("opt_proj", 2560): "opt-2.7b",
    ("opt_proj", 4096): "opt-6.7b",
    ("t5_proj", 2048): "flan-t5-xl",
    ("t5_proj", 4096): "flan-t5-xxl",
}
_LAVIS_VISION = {1408: VisionConfig(name="vitg", layer=-1), 1024: VisionConfig(name="vitl", layer=-2)}
_OPT_END, _T5_QUESTION = "\n", "Question: {} Short answer:"
_KEY = "qformer.layers.0.cross_attention.key.weight"


@dataclass(frozen=True)
class Checkpoint:
    """What was found: how to build its model, and its tensors.

    Args:
        source: file or folder, for messages.
        format: whose it is.
        config: of the run; its towers are those that the checkpoint was trained with.
        tensors: what trains, under our names.
        vision: an image encoder that came along in a LAVIS file (fine-tuned ones do), under the
            names of `Blip2VisionModel`; empty elsewhere.
        allowed: what a load may leave out or start fresh because the format does not hold it.
        partial: a bare Q-Former, which can start a training and cannot be used by itself.
    """

    source: str
    format: Format
    config: RunConfig
    tensors: Tensors
    vision: Tensors = field(default_factory=dict)
    allowed: Allowed = field(default_factory=Allowed)
    partial: bool = False


def open_checkpoint(source: str | Path, *, vision: str | None = None, language: str | None = None) -> Checkpoint:
    """Open a checkpoint of any of the three formats.

    Args:
        source: run folder or weights file of ours, preset name, Hugging Face folder or hub id, or
            LAVIS `.pth`.
        vision, language: image encoder and language model in place of those that it names.

    Raises:
        CheckpointError: nothing there, incomplete, damaged, or not a BLIP-2 checkpoint.
    """
    found = _open(source)
    config = found.config
    if vision:
        config = replace(config, vision=replace(config.vision, name=vision))
    if language:
        config = replace(config, language=replace(config.language, name=language))
    return replace(found, config=config)


def is_hub_id(name: str) -> bool:
    """Whether a text has the form `owner/name` and is no path here."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not Path(name).exists()


def _open(source: str | Path) -> Checkpoint:
    path = Path(source)
    if path.is_dir() and (path / "config.json").is_file():
        return _open_huggingface(str(source), path)
    if path.is_file() and path.suffix != ".safetensors":
        return _open_lavis(path)
    if path.exists():
        run = runs.open_run(path)
        return Checkpoint(str(run.weights), "blip2", run.config, open_safetensors(run.weights))
    name = PRESETS.get(str(source), str(source))
    if is_hub_id(name) and not Path(name).suffix:
        return _open_huggingface(name, hub.snapshot(name))
    raise CheckpointError(
        f"{source}: no such run folder or checkpoint file, and no preset ({', '.join(PRESETS)}) or hub id (OWNER/NAME)"
    )


# -- transformers ---------------------------------------------------------------------------------


def _open_huggingface(source: str, folder: Path) -> Checkpoint:
    config = hub.load_config(str(folder))
    if config.model_type == "blip_2_qformer":
        return _bare_qformer(source, config, open_folder(folder))
    if config.model_type != "blip-2":
        raise CheckpointError(f"{source}: a {config.model_type} model, not a BLIP-2 one")
    theirs = open_folder(folder)
    both = names.huggingface(names.depth_of(theirs))
    tensors = _renamed(theirs, both, (*names.HF_TOWERS, *names.HF_IGNORED), source)
    allowed = Allowed()
    if "language_proj.weight" not in tensors:
        side = folder / SIDE_FILE
        tensors |= open_safetensors(side) if side.is_file() else {}
        allowed = Allowed(fresh=names.HF_WITHOUT)
    run = _side_config(folder) or _huggingface_config(config, str(folder), tensors)
    return Checkpoint(source, "hf", run, _one_batch(tensors), allowed=allowed)


def _huggingface_config(config: Any, folder: str, tensors: Tensors) -> RunConfig:
    q, text = config.qformer_config, config.text_config
    stage = "stage2" if "language_proj.weight" in tensors else "stage1"
    options: dict[str, Any] = {}
    if text.model_type == "opt":
        options["end"] = _OPT_END
    elif text.is_encoder_decoder:
        options["question"] = _T5_QUESTION
    return RunConfig(
        recipe="huggingface",
        stage=stage,
        vision=VisionConfig(name=folder, image_size=None, norm_eps=config.vision_config.layer_norm_eps),
        qformer=QFormerConfig(
            init=folder,
            queries=config.num_query_tokens,
            cross_every=q.cross_attention_frequency,
            embed_dim=config.image_text_hidden_size,
            dropout=q.hidden_dropout_prob,
            attention_dropout=q.attention_probs_dropout_prob,
        ),
        # stage 1 has none: the default stays
        language=LanguageConfig(name=folder, **options) if stage == "stage2" else LanguageConfig(),
    )


def _side_config(folder: Path) -> RunConfig | None:
    """The configuration of a run of ours that was converted, with its towers in this folder."""
    from blip2.weights.native import read_metadata

    side = folder / SIDE_FILE
    stored = read_metadata(side).get("config") if side.is_file() else None
    if stored is None:
        return None
    run: RunConfig = from_dict(RunConfig, json.loads(stored), str(side))
    language = run.language if run.stage == "stage1" else replace(run.language, name=str(folder))
    return replace(
        run,
        init=None,
        vision=replace(run.vision, name=str(folder)),
        qformer=replace(run.qformer, init=str(folder)),
        language=language,
    )


def _bare_qformer(source: str, config: Any, theirs: Tensors) -> Checkpoint:
    tensors = _renamed(theirs, names.huggingface_qformer(names.depth_of(theirs)), names.HF_IGNORED, source)
    fresh = ("qformer.query_tokens", "qformer.embeddings.", "ln_vision.", "vision_proj.", "text_proj.", "itm_head.")
    run = RunConfig(
        recipe="huggingface",
        vision=VisionConfig(name=source),
        qformer=QFormerConfig(init=source, cross_every=config.cross_attention_frequency),
    )
    allowed = Allowed(fresh=(*fresh, *names.HF_WITHOUT, *STAGE2_ONLY))
    return Checkpoint(source, "hf", run, tensors, allowed=allowed, partial=True)


# -- LAVIS ----------------------------------------------------------------------------------------


def _open_lavis(path: Path) -> Checkpoint:
    theirs, beside = open_pickled(path)
    _require_blip2(path, theirs)
    projection = next((p for p in names.LAVIS_PROJECTIONS if f"{p}.weight" in theirs), None)
    vision_names = [n for n in theirs if n.startswith(names.LAVIS_VISION)]
    both = names.lavis(names.depth_of(theirs), projection or names.LAVIS_PROJECTIONS[0])
    tensors = _renamed(theirs, both, (*names.LAVIS_IGNORED, names.LAVIS_VISION), str(path))
    if "temp" in tensors:
        tensors["temp"] = tensors["temp"].reshaped(1)
    vision = _eva({name: theirs[name] for name in vision_names}, path) if vision_names else {}
    stored = beside.get("blip2")
    if isinstance(stored, str):
        run: RunConfig = from_dict(RunConfig, json.loads(stored), str(path))
        run = replace(run, init=None)
    else:
        run = _lavis_config(path, tensors, projection, vision)
    return Checkpoint(str(path), "lavis", run, _one_batch(tensors), vision)


def _require_blip2(path: Path, theirs: Tensors) -> None:
    for part, model in names.LAVIS_OTHERS.items():
        if any(name.startswith(part) for name in theirs):
            raise CheckpointError(f"{path}: a checkpoint of {model}, not of BLIP-2")
    if "query_tokens" not in theirs or not any(name.startswith("Qformer.") for name in theirs):
        raise CheckpointError(f"{path}: not a LAVIS BLIP-2 checkpoint (no query_tokens and Qformer.* in it)")


def _lavis_config(path: Path, tensors: Tensors, projection: str | None, vision: Tensors) -> RunConfig:
    queries, width = tensors["qformer.query_tokens"].shape[-2:]
    if width != 768 or names.depth_of(tensors) != 12:
        raise CheckpointError(
            f"{path}: its Q-Former is {width} wide with {names.depth_of(tensors)} layers, and LAVIS's only is "
            "BERT-base (768, 12)"
        )
    features = tensors[_KEY].shape[1]
    if features not in _LAVIS_VISION:
        raise CheckpointError(
            f"{path}: made for an image encoder {features} wide; LAVIS has 1408 (ViT-g), 1024 (ViT-L)"
        )
    encoder = _LAVIS_VISION[features]
    if vision:
        encoder = replace(encoder, image_size=_side(vision["embeddings.position_embedding"].shape[1]))
    language = LanguageConfig()
    if projection is not None:
        hidden = tensors["language_proj.weight"].shape[0]
        name = _LAVIS_LANGUAGE.get((projection, hidden))
        if name is None:
            raise CheckpointError(f"{path}: made for a language model {hidden} wide, which is none of LAVIS's")
        t5 = projection == "t5_proj"
        language = LanguageConfig(name, question=_T5_QUESTION) if t5 else LanguageConfig(name, end=_OPT_END)
    return RunConfig(
        recipe="lavis",
        stage="stage2" if projection else "stage1",
        vision=encoder,
        qformer=QFormerConfig(init="bert-base", queries=queries, attention_dropout=0.1),
        language=language,
    )


def _eva(theirs: Tensors, path: Path) -> Tensors:
    """EVA ViT-g under the names of `Blip2VisionModel`; the bias of q, k, v becomes cat(q, 0, v)."""
    import torch

    from blip2.weights.tensors import LazyTensor

    blocks = [int(name.split(".")[2]) for name in theirs if name.startswith("visual_encoder.blocks.")]
    if not blocks:
        raise CheckpointError(f"{path}: its image encoder is not EVA ViT-g; convert a checkpoint without one")
    both = names.eva(max(blocks) + 1)
    biases = tuple(
        f"visual_encoder.blocks.{n}.attn.{kind}" for n in range(max(blocks) + 1) for kind in ("q_bias", "v_bias")
    )
    out = _renamed(theirs, both, biases, str(path))
    for n in range(max(blocks) + 1):
        q, v = (theirs[f"visual_encoder.blocks.{n}.attn.{kind}"] for kind in ("q_bias", "v_bias"))

        def join(q: LazyTensor = q, v: LazyTensor = v) -> torch.Tensor:
            return torch.cat([q.read(), torch.zeros(q.shape, dtype=q.dtype), v.read()])

        out[f"encoder.layers.{n}.self_attn.qkv.bias"] = LazyTensor((3 * q.shape[0],), q.dtype, join)
    return out


def _side(positions: int) -> int:
    """Pixels of the side of an image with so many positions, [CLS] included, in patches of 14."""
    return 14 * math.isqrt(positions - 1)


def _renamed(theirs: Tensors, both: dict[str, str], ignored: tuple[str, ...], source: str) -> Tensors:
    """Their tensors under our names; what is neither in the table nor in the list is an error."""
    back = {their: ours for ours, their in both.items()}
    unknown = [name for name in theirs if name not in back and not names.listed(name, ignored)]
    if unknown:
        raise CheckpointError(f"{source}: {unknown[0]} is no tensor of BLIP-2 ({len(unknown)} such)")
    return {back[name]: lazy for name, lazy in theirs.items() if name in back}


def _one_batch(tensors: Tensors) -> Tensors:
    """Query tokens as [Q, D]: both formats keep [1, Q, D]."""
    queries = tensors.get("qformer.query_tokens")
    if queries is not None and len(queries.shape) == 3:
        tensors["qformer.query_tokens"] = queries.reshaped(*queries.shape[1:])
    return tensors
