"""A folder that transformers' own `Blip2For...` or `InstructBlip...` classes and processor open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2.configs import RunConfig, to_dict
from blip2.data.tokenizers import QFORMER_TOKENIZER, LanguageTokenizer
from blip2.errors import CheckpointError
from blip2.io.atomic import write_json
from blip2.models import towers
from blip2.models.build import EXTRA_TOKENS, bert_config
from blip2.models.vision.encoder import CLIP_MEAN, CLIP_STD, normalisation
from blip2.weights import names, runs
from blip2.weights.adapters import has_adapters, merged, without_adapters
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.frozen_towers import (
    Tower,
    folder_of,
    language_tower,
    require_tokenizer,
    text_folder,
    vision_tower,
)
from blip2.weights.huggingface import FILM_FRAMES, SIDE_FILE
from blip2.weights.lazy_tensors import LazyTensor, Tensors, write_folder

Progress = Callable[[int], object]


def write_huggingface(
    checkpoint: Checkpoint, output: Path, progress: Progress | None = None
) -> tuple[dict[Path, Tensors], list[str]]:
    """Write `config.json`, weights, tokenizer and processor of a checkpoint into a new folder.

    Stage 1 becomes `Blip2ForImageTextRetrieval`, stage 2 `Blip2ForConditionalGeneration`, or InstructBLIP's class of
    that name where its Q-Former reads instructions. What transformers has no place for (temperature, ITG head, our
    configuration) goes into a file beside.

    Returns:
        Tensors by the file or folder they were written to, and notes for the user.

    Raises:
        CheckpointError: the image encoder is not of the one kind that transformers' BLIP-2 knows.
    """
    vision, adapted = vision_tower(checkpoint), checkpoint
    _require_known(checkpoint, vision)
    checkpoint = without_adapters(checkpoint)
    output.mkdir()
    kind = kind_of(checkpoint.config)
    theirs_by_ours = names.huggingface(names.depth_of(checkpoint.tensors), instruct=kind.instruct)
    tensors = {f"vision_model.{name}": lazy for name, lazy in vision.tensors.items()}
    tensors |= {theirs_by_ours[ours]: lazy for ours, lazy in checkpoint.tensors.items() if ours in theirs_by_ours}
    tensors["query_tokens"] = tensors["query_tokens"].reshaped(1, *tensors["query_tokens"].shape)
    extra = {ours: lazy for ours, lazy in checkpoint.tensors.items() if ours not in theirs_by_ours}
    notes = []
    if checkpoint.config.stage == "stage1":
        config = _config(checkpoint, kind, vision, None)
        _write_stage1(config, checkpoint.config, output)
        if extra:
            notes.append(f"{len(extra)} tensors that transformers has no place for are in {SIDE_FILE}")
    else:
        language = language_tower(checkpoint.config)
        if has_adapters(adapted):
            language = merged(language, adapted)
            notes.append("LoRA adapters are merged into the language model")
        image_token = _write_stage2(checkpoint.config, kind, language, vision, output)
        if checkpoint.config.qformer.instruction == "question":
            notes.append("its Q-Former was trained on bare questions: give those as the processor's qformer_input_ids")
        language = _with_row(language, image_token)
        if kind.token == "video":
            notes.append(f"it is transformers' InstructBlipVideo, of films of {FILM_FRAMES} frames (vision.frames)")
        if "image_places" in extra:
            notes.append("transformers has no learned marks for the place of an image: it leaves them out")
        config = _config(checkpoint, kind, vision, language)
        setattr(config, f"{kind.token}_token_index", image_token)
        tensors |= {f"language_model.{name}": lazy for name, lazy in language.tensors.items()}
    config.architectures = [kind.model]
    config.save_pretrained(output)
    write_folder(output, tensors, progress=progress)
    runs.write_weights(output / SIDE_FILE, extra, to_dict(checkpoint.config))
    return {output: tensors, output / SIDE_FILE: extra}, notes


# Tensors of a row per word in the language models of transformers.
_BY_WORD = tuple(
    f"{name}.weight"
    for name in ("embed_tokens", "shared", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
)


@dataclass(frozen=True)
class Kind:
    """Classes of transformers that a run becomes.

    Args:
        token: what its placeholder stands for: `image` or `video`.
        instruct: with the text branch and the tokenizer of a Q-Former that reads instructions.
    """

    model: str
    config: str
    processor: str
    token: str = "image"
    instruct: bool = False


_INSTRUCT = Kind("InstructBlipForConditionalGeneration", "InstructBlipConfig", "InstructBlipProcessor", instruct=True)
_VIDEO = Kind(
    "InstructBlipVideoForConditionalGeneration", "InstructBlipVideoConfig", "InstructBlipVideoProcessor", "video", True
)
_KINDS = {
    "stage1": Kind("Blip2ForImageTextRetrieval", "Blip2Config", "Blip2Processor"),
    "stage2": Kind("Blip2ForConditionalGeneration", "Blip2Config", "Blip2Processor"),
}


def kind_of(run: RunConfig) -> Kind:
    """The classes that hold this run."""
    if run.qformer.instruction is None:
        return _KINDS[run.stage]
    return _VIDEO if run.vision.frames == FILM_FRAMES else _INSTRUCT


def _require_known(checkpoint: Checkpoint, vision: Tower) -> None:
    settings, kind = checkpoint.config.vision, vision.config.model_type
    if kind != "blip_2_vision_model":
        raise CheckpointError(
            f"{checkpoint.source}: its image encoder is {settings.name} ({kind}), and transformers' BLIP-2 has only "
            "EVA ViT-g's kind (Blip2VisionModel); --to blip2 and --to lavis work"
        )
    if settings.pool != 1 or settings.layer not in (None, -1, vision.config.num_hidden_layers - 1):
        raise CheckpointError(
            f"{checkpoint.source}: vision.layer {settings.layer} and vision.pool {settings.pool} have no place in "
            "transformers' BLIP-2, which takes all patches of the last block"
        )


def _config(checkpoint: Checkpoint, kind: Kind, vision: Tower, language: Tower | None) -> Any:
    """The `Blip2Config` or `InstructBlipConfig` of a checkpoint."""
    import transformers

    settings = checkpoint.config.qformer
    bert = bert_config(settings.init, weights=False)
    queries, width = checkpoint.tensors["qformer.query_tokens"].shape
    words = checkpoint.tensors.get("qformer.embeddings.word.weight")
    sizes = {name: value for name, value in vision.config.to_dict().items() if name != "model_type"}
    own = {} if kind.instruct else {"image_text_hidden_size": settings.embed_dim}
    return getattr(transformers, kind.config)(
        vision_config=sizes,
        qformer_config={
            "vocab_size": words.shape[0] if words else bert.vocab_size + EXTRA_TOKENS,
            "hidden_size": width,
            "num_hidden_layers": bert.num_hidden_layers,
            "num_attention_heads": bert.num_attention_heads,
            "intermediate_size": bert.intermediate_size,
            "max_position_embeddings": bert.max_position_embeddings,
            "layer_norm_eps": bert.layer_norm_eps,
            "hidden_dropout_prob": settings.dropout,
            "attention_probs_dropout_prob": settings.attention_dropout,
            "cross_attention_frequency": settings.cross_every,
            "encoder_hidden_size": vision.config.hidden_size,
            **({} if kind.instruct else {"use_qformer_text_input": words is not None}),
        },
        text_config=language.config.to_dict() if language else None,
        num_query_tokens=queries,
        **own,
    )


def _write_stage1(config: Any, run: RunConfig, output: Path) -> None:
    """Processor of a retrieval model."""
    tokenizer = _text_tokenizer(run)
    with towers.readable(str(output)):
        _save_processor(_KINDS["stage1"], [tokenizer], None, config.vision_config, run, output)


def _text_tokenizer(run: RunConfig) -> Any:
    """The tokenizer of the Q-Former's text branch: BERT's with [DEC] as its last word."""
    from transformers import AutoTokenizer

    source = text_folder(folder_of(run.qformer.init))
    require_tokenizer(source)
    with towers.readable(str(source)):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if "[DEC]" not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def _write_stage2(run: RunConfig, kind: Kind, language: Tower, vision: Tower, output: Path) -> int:
    """Processor and generation settings; returns the id of the image token.

    The processor adds `<image>` (or `<video>`) as the tokenizer's next word.
    """
    from transformers import AutoTokenizer, GenerationConfig

    assert language.folder is not None
    end = LanguageTokenizer(
        str(language.folder),
        start=run.language.start,
        end=run.language.end,
        max_text=run.language.max_text,
        encoder_decoder=language.config.is_encoder_decoder,
    ).end_id
    with towers.readable(str(language.folder)):
        tokenizer = AutoTokenizer.from_pretrained(language.folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if run.language.start is not None:
            _begin_with(tokenizer, run.language.start)
        tokenizers = [tokenizer, _text_tokenizer(run)] if kind.instruct else [tokenizer]
        _save_processor(kind, tokenizers, run.qformer.queries, vision.config, run, output)
        image_token = int(tokenizer.convert_tokens_to_ids(f"<{kind.token}>"))
        GenerationConfig(
            bos_token_id=getattr(language.config, "bos_token_id", None),
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=getattr(language.config, "decoder_start_token_id", None),
            suppress_tokens=[image_token],
        ).save_pretrained(output)
    return image_token


def _begin_with(tokenizer: Any, start: str) -> None:
    """Put another special token in front of every text, as LAVIS does for Vicuna."""
    from tokenizers.processors import TemplateProcessing

    special = [(start, tokenizer.convert_tokens_to_ids(start))]
    tokenizer.bos_token = start
    template = TemplateProcessing(single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template


def _save_processor(
    kind: Kind, tokenizers: list[Any], queries: int | None, vision: Any, run: RunConfig, output: Path
) -> None:
    import transformers
    from transformers import BlipImageProcessorPil

    side = run.vision.image_size or vision.image_size
    source = towers.folder(run.vision.name)
    mean, std = normalisation(vision, source) if Path(source).is_dir() else (CLIP_MEAN, CLIP_STD)
    settings = {"size": {"height": side, "width": side}, "image_mean": list(mean), "image_std": list(std)}
    if kind.token == "video":
        _save_film_processor(kind, tokenizers[0], tokenizers[1], queries, settings, output)
        return
    images = BlipImageProcessorPil(**settings)
    getattr(transformers, kind.processor)(images, *tokenizers, num_query_tokens=queries).save_pretrained(output)


def _save_film_processor(
    kind: Kind, tokenizer: Any, text_tokenizer: Any, queries: int | None, settings: dict[str, Any], output: Path
) -> None:
    """What `InstructBlipVideoProcessor.save_pretrained` writes: the class cannot be built without torchvision."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken("<video>", normalized=False, special=True)], special_tokens=True)
    tokenizer.save_pretrained(output)
    text_tokenizer.save_pretrained(output / QFORMER_TOKENIZER)
    frames = {"video_processor_type": "InstructBlipVideoVideoProcessor", "do_resize": True, "do_rescale": True}
    frames |= {"do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255, **settings}
    write_json(output / "video_preprocessor_config.json", frames)
    write_json(
        output / "processor_config.json",
        {"processor_class": kind.processor, "num_query_tokens": queries, "video_processor": frames},
    )


def _with_row(language: Tower, image_token: int) -> Tower:
    """Room for the image token: a row of zeros where the vocabulary is full (it is never generated)."""
    rows = language.config.vocab_size
    if image_token < rows:
        return language
    language.config.vocab_size = image_token + 1
    grown = {
        name: _padded(lazy, image_token + 1) if lazy.shape[0] == rows and name.endswith(_BY_WORD) else lazy
        for name, lazy in language.tensors.items()
    }
    return Tower(language.config, grown, language.folder)


def _padded(lazy: LazyTensor, rows: int) -> LazyTensor:
    def read() -> Tensor:
        value = lazy.read()
        return torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])

    return LazyTensor((rows, *lazy.shape[1:]), lazy.dtype, read)
