"""BLIP-2 and InstructBLIP of transformers: generation, image-text retrieval, `Blip2Model`, and a bare Q-Former."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from blip2.configs import BLIP2_TYPES, LanguageConfig, QFormerConfig, RunConfig, VisionConfig
from blip2.errors import CheckpointError, ConfigError
from blip2.models import towers
from blip2.weights import names
from blip2.weights.checkpoint import INSTRUCT_LANGUAGE, INSTRUCT_TEXT, OPT_END, T5_QUESTION, Checkpoint, stored_config
from blip2.weights.lazy_tensors import Tensors, open_folder, open_safetensors, read_metadata
from blip2.weights.loading import STAGE2_ONLY, Allowed

# Our tensors that transformers has no place for, beside the folder's own weights.
SIDE_FILE = "blip2.safetensors"
# Frames of a film in InstructBlipVideo, whose processor knows no other number.
FILM_FRAMES = 4


def open_huggingface(source: str, folder: Path) -> Checkpoint:
    """Open a folder of transformers; `source` is its name for messages.

    Raises:
        CheckpointError: not BLIP-2, incomplete, or with tensors that have no place.
    """
    config = towers.load_config(str(folder))
    if config.model_type == "blip_2_qformer":
        return _bare_qformer(source, config, open_folder(folder))
    if config.model_type not in BLIP2_TYPES:
        raise CheckpointError(f"{source}: a {config.model_type} model, not a BLIP-2 one")
    theirs = open_folder(folder)
    theirs_by_ours = names.huggingface(names.depth_of(theirs), instruct=config.model_type != "blip-2")
    tensors = names.renamed(theirs, theirs_by_ours, (*names.HF_TOWERS, *names.HF_IGNORED), source)
    side = folder / SIDE_FILE
    tensors |= open_safetensors(side) if side.is_file() else {}
    allowed = Allowed() if "language_proj.weight" in tensors else Allowed(fresh=names.HF_WITHOUT)
    try:
        run = _side_config(folder) or _huggingface_config(config, str(folder), tensors)
    except ConfigError as error:
        raise CheckpointError(f"{source}: its configuration cannot be used: {error}") from error
    return Checkpoint(source, "hf", run, names.without_batch_axis(tensors), allowed=allowed)


def _huggingface_config(config: Any, folder: str, tensors: Tensors) -> RunConfig:
    q, text = config.qformer_config, config.text_config
    stage = "stage2" if "language_proj.weight" in tensors else "stage1"
    language, reader = LanguageConfig(), {}
    if config.model_type != "blip-2":
        language, reader = replace(INSTRUCT_LANGUAGE, name=folder), INSTRUCT_TEXT
    elif stage == "stage2":
        language = LanguageConfig(folder, end=OPT_END if text.model_type == "opt" else None)
        language = replace(language, question=T5_QUESTION) if text.is_encoder_decoder else language
    return RunConfig(
        recipe="huggingface",
        stage=stage,
        vision=VisionConfig(
            name=folder,
            image_size=None,
            norm_eps=config.vision_config.layer_norm_eps,
            frames=FILM_FRAMES if config.model_type == "instructblipvideo" else None,
        ),
        qformer=QFormerConfig(
            init=folder,
            queries=config.num_query_tokens,
            cross_every=q.cross_attention_frequency,
            embed_dim=getattr(config, "image_text_hidden_size", 256),
            dropout=q.hidden_dropout_prob,
            attention_dropout=q.attention_probs_dropout_prob,
            **reader,
        ),
        language=language,
    )


def _side_config(folder: Path) -> RunConfig | None:
    """The configuration of a run of ours that was converted, with its towers in this folder."""
    side = folder / SIDE_FILE
    stored = read_metadata(side).get("config") if side.is_file() else None
    if stored is None:
        return None
    run = stored_config(stored, str(side))
    language = run.language if run.stage == "stage1" else replace(run.language, name=str(folder))
    return replace(
        run,
        init=None,
        vision=replace(run.vision, name=str(folder)),
        qformer=replace(run.qformer, init=str(folder)),
        language=language,
    )


def _bare_qformer(source: str, config: Any, theirs: Tensors) -> Checkpoint:
    tensors = names.renamed(theirs, names.huggingface_qformer(names.depth_of(theirs)), names.HF_IGNORED, source)
    fresh = ("qformer.query_tokens", "qformer.embeddings.", "ln_vision.", "vision_proj.", "text_proj.", "itm_head.")
    run = RunConfig(
        recipe="huggingface",
        vision=VisionConfig(name=source),
        qformer=QFormerConfig(init=source, cross_every=config.cross_attention_frequency),
    )
    allowed = Allowed(fresh=(*fresh, *names.HF_WITHOUT, *STAGE2_ONLY))
    return Checkpoint(source, "hf", run, tensors, allowed=allowed, partial=True)
