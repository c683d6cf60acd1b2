"""Write a checkpoint in another format: ours, Hugging Face's or LAVIS's; read back and compared.

Tensors are read and written one at a time, under another name. Everything is written beside the
target and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blip2.configs import RunConfig, to_dict
from blip2.data.sources import open_collection
from blip2.data.tokenizers import QFormerTokenizer
from blip2.errors import CheckpointError, os_error_as
from blip2.io.atomic import replacing
from blip2.models import towers
from blip2.models.build import bert_config
from blip2.weights import compact, names, runs
from blip2.weights.adapters import has_adapters, with_merged_qformer
from blip2.weights.checkpoint import Checkpoint, Format
from blip2.weights.convert.export_hf import write_huggingface
from blip2.weights.formats import located, open_checkpoint, stage1_behind
from blip2.weights.frozen_towers import (
    copy_tokenizer,
    folder_of,
    language_config,
    language_tower,
    text_folder,
    vision_tower,
    with_own_encoder,
)
from blip2.weights.lazy_tensors import (
    Tensors,
    as_bytes,
    lazily,
    open_folder,
    open_pickled,
    open_safetensors,
    write_folder,
)
from blip2.weights.validate import require_complete

_STAGE1 = "stage1"  # folder of a stage 2 that holds the stage 1 it takes along
Progress = Callable[[int], object]
# Tensors by the file or folder they were written to, and notes for the user.
Written = tuple[dict[Path, Tensors], list[str]]


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        target: folder or file.
        tensors, nbytes: all that were written, each read back and equal to its source.
        notes: what a user should know: parts left out, names that point elsewhere.
    """

    target: Path
    tensors: int
    nbytes: int
    notes: tuple[str, ...] = ()


def convert(
    source: str | Path | Checkpoint,
    target: str | Path,
    to: Format | Literal["slim"],
    progress: Progress | None = None,
    *,
    words: str | None = None,
    stage1: str | None = None,
) -> Converted:
    """Write a checkpoint in another format.

    Args:
        source: what `blip2.load` takes, or an open checkpoint.
        target: folder for `blip2`, `slim` and `hf`, file (`.pth`) for `lavis`; must not exist yet.
        to: `blip2`, `hf`, `lavis`, or `slim`: a run of ours to hand on, in bf16 and without its towers.
        progress: called with bytes written, then with bytes read back.
        words: of `slim`: of the word embeddings that training moved keep only those of words that the
            captions of this data set have more than once; the rest is again that of `qformer.init` when
            the file is opened. None keeps all that moved.
        stage1: of `blip2` and `slim`: checkpoint of the stage 1 that a stage 2 takes along, for embeddings and
            matches, into the folder `stage1` of the target; "" is the one that it began from. For `slim` the name of
            a folder that lies, or will lie, beside the target is only noted. None takes none along.

    Raises:
        CheckpointError: the target exists or cannot be written, the format has no place for this
            model, or what was written reads back differently.
    """
    target = Path(target)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if to in ("hf", "lavis"):
        checkpoint = with_merged_qformer(checkpoint)
    require_possible(checkpoint, target, to)
    parent = None if stage1 is None else _stage1_of(checkpoint, target, to, stage1)
    if parent is not None:
        require_possible(parent, target, to)
        checkpoint, stage1 = replace(checkpoint, config=replace(checkpoint.config, init=_STAGE1)), _STAGE1
    checkpoint = with_own_encoder(checkpoint) if to in ("hf", "lavis") else checkpoint
    writers = {"blip2": _write_blip2, "hf": write_huggingface, "lavis": _write_lavis}
    with os_error_as(CheckpointError, f"{target}: cannot be written"), replacing(target) as output:
        target.parent.mkdir(parents=True, exist_ok=True)
        if to == "slim":
            written, notes = _write_slim(checkpoint, output, progress, words, stage1)
        else:
            written, notes = writers[to](checkpoint, output, progress)
        if parent is not None:
            inside = output / _STAGE1
            more, _ = (
                _write_slim(parent, inside, progress, words, None)
                if to == "slim"
                else _write_blip2(parent, inside, progress)
            )
            written |= more
            notes.append(f"its stage 1, {parent.source}, is in {_STAGE1}/")
        count, size = _verify(written, progress)
        if target.is_dir():
            target.rmdir()
    return Converted(target, count, size, tuple(notes))


def _stage1_of(checkpoint: Checkpoint, target: Path, to: str, stage1: str) -> Checkpoint | None:
    """The stage 1 to take along; None where it is only named, beside the target."""
    beside = bool(stage1) and ((target.parent / stage1).is_dir() or not Path(located(stage1)).exists())
    if to == "slim" and beside:
        return None
    if to not in ("blip2", "slim") or checkpoint.config.stage != "stage2":
        raise CheckpointError(f"{checkpoint.source}: --stage1 is for a stage 2 that becomes a run of ours")
    if stage1:
        return _require_stage1(open_checkpoint(stage1))
    if not checkpoint.config.init:
        raise CheckpointError(f"{checkpoint.source}: it does not say which stage 1 it began from: give --stage1 RUN")
    return stage1_behind(checkpoint.config.init, Path(checkpoint.source))


def _require_stage1(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.config.stage != "stage1":
        raise CheckpointError(f"{checkpoint.source}: a stage 2: --stage1 takes a stage 1")
    return checkpoint


def require_possible(checkpoint: Checkpoint, target: Path, to: Format | Literal["slim"]) -> None:
    """What can be known to fail fails before anything is written."""
    runs.require_new(target)
    checkpoint = with_merged_qformer(checkpoint) if to in ("hf", "lavis") else checkpoint
    if checkpoint.partial:
        raise CheckpointError(f"{checkpoint.source}: a Q-Former alone: there is nothing to convert it to")
    if to == "slim" and checkpoint.format != "blip2":
        raise CheckpointError(f"{checkpoint.source}: slim is for runs of ours: convert it with --to blip2 first")
    settings = checkpoint.config.qformer
    pooled = checkpoint.config.stage == "stage1" and settings.text_pool != "cls"
    unsupported = {
        "a linear layer in place of the Q-Former": settings.bridge != "qformer",
        "texts as means of tokens": pooled,
    }
    what = next((what for what, used in unsupported.items() if used), None)
    if to in ("hf", "lavis") and what is not None:
        raise CheckpointError(f"{checkpoint.source}: {what}, for which BLIP-2 of transformers and LAVIS has no place")
    if to == "lavis" and settings.image_places:
        raise CheckpointError(f"{checkpoint.source}: learned marks of an image's place, for which LAVIS has no place")
    if to == "lavis" and has_adapters(checkpoint):
        raise CheckpointError(
            f"{checkpoint.source}: LAVIS files hold no language model, so its LoRA adapters have no place; "
            "--to blip2 keeps them, --to hf merges them"
        )
    if to == "lavis" and target.suffix not in (".pth", ".pt"):
        raise CheckpointError(f"{target}: a LAVIS checkpoint is one file: give a name that ends in .pth")
    require_complete(checkpoint)


def _verify(written: dict[Path, Tensors], progress: Progress | None) -> tuple[int, int]:
    """Read back every tensor and compare it bit by bit with its source."""
    count, size = 0, 0
    for path, tensors in written.items():
        back = _open_any(path)
        if back.keys() != tensors.keys():
            raise CheckpointError(f"{path}: reads back with other tensors than were written")
        for name, lazy in tensors.items():
            if not torch.equal(as_bytes(back[name].read()), as_bytes(lazy.read())):
                raise CheckpointError(f"{path}: {name} reads back differently: the disk or the source is at fault")
            count, size = count + 1, size + lazy.nbytes
            if progress is not None:
                progress(lazy.nbytes)
    return count, size


def _open_any(path: Path) -> Tensors:
    if path.is_dir():
        return open_folder(path)
    return open_safetensors(path) if path.suffix == ".safetensors" else open_pickled(path)[0]


# -- ours -----------------------------------------------------------------------------------------


def _write_blip2(checkpoint: Checkpoint, output: Path, progress: Progress | None) -> Written:
    """A run folder: what trains, and in folders of their own the towers that the source brought along."""
    output.mkdir()
    config, written, notes = replace(checkpoint.config, out=None), {}, []
    missing = sorted({name.split(".")[0] for name in _absent_parts(checkpoint)})
    if checkpoint.format == "hf" or checkpoint.vision:
        tower = vision_tower(checkpoint)
        written[output / "vision"] = _write_tower(output / "vision", tower.config, tower.tensors, progress)
        _copy_preprocessor(tower.folder, output / "vision")
        config = replace(config, vision=replace(config.vision, name="./vision"))
    if checkpoint.format == "hf" and config.stage == "stage2":
        tower = language_tower(config)
        written[output / "language"] = _write_tower(output / "language", tower.config, tower.tensors, progress)
        assert tower.folder is not None
        copy_tokenizer(tower.folder, output / "language")
        config = replace(config, language=replace(config.language, name="./language"))
    if checkpoint.format == "hf":
        (output / "text").mkdir()
        bert_config(checkpoint.config.qformer.init, weights=False).save_pretrained(output / "text")
        if config.stage == "stage1" or config.qformer.instruction:
            copy_tokenizer(text_folder(folder_of(checkpoint.config.qformer.init)), output / "text")
        config = replace(config, qformer=replace(config.qformer, init="./text"))
    tensors = checkpoint.tensors | _new_parts(checkpoint)
    runs.write_run(output, tensors, config, progress)
    if missing:
        notes.append(f"not in the source, so newly initialised: {', '.join(missing)}")
    for what, name in (("image encoder", config.vision.name), ("language model", config.language.name)):
        if not name.startswith("./") and (what == "image encoder" or config.stage == "stage2"):
            notes.append(f"{what}: {name}, loaded from there when the run is used")
    return {output / runs.WEIGHTS: tensors, **written}, notes


def _write_slim(
    checkpoint: Checkpoint, output: Path, progress: Progress | None, words: str | None, stage1: str | None
) -> Written:
    """A run folder of one small file."""
    output.mkdir()
    tensors = compact.shrink(checkpoint, _words_of(words, checkpoint.config) if words else None)
    config = replace(
        checkpoint.config,
        out=None,
        init=stage1 or (Path(checkpoint.config.init).name if checkpoint.config.init else None),
    )
    runs.write_run(output, tensors, config, progress)
    notes = [f"towers are not in it: {config.vision.name}, {config.qformer.init}, {config.language.name}"]
    if compact.ROWS in tensors:
        notes.append(f"{tensors[compact.ROWS].shape[0]} words are in it, the rest is that of {config.qformer.init}")
    if config.qformer.lock_text and len(tensors) < len(checkpoint.tensors):
        notes.append(f"its text branch was not trained and is that of {config.qformer.init}")
    return {output / runs.WEIGHTS: tensors}, notes


def _words_of(data: str, config: RunConfig) -> Tensor:
    """Ids of the words that the captions of a data set have more than once, special tokens included."""
    tokenizer = QFormerTokenizer(towers.folder(config.qformer.init), config.qformer.max_text)
    captions = [caption for sample in open_collection(data).samples for caption in sample.captions]
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for start in range(0, len(captions), 1000):
        ids, mask = tokenizer(captions[start : start + 1000])
        counts += ids[mask].bincount(minlength=len(counts))
    return (counts > 1).nonzero()[:, 0]


def _write_tower(folder: Path, config: object, tensors: Tensors, progress: Progress | None) -> Tensors:
    folder.mkdir()
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    write_folder(folder, tensors, progress=progress)
    return tensors


def _copy_preprocessor(source: Path | None, target: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _absent_parts(checkpoint: Checkpoint) -> list[str]:
    """What a run of ours holds and this checkpoint does not: the ITG head and the temperature."""
    if checkpoint.config.stage == "stage2":
        return []
    return [name for name in ("temp", "qformer.head.bias") if name not in checkpoint.tensors]


def _new_parts(checkpoint: Checkpoint) -> Tensors:
    """Fresh values of what is absent, as a new Q-Former starts."""
    if not _absent_parts(checkpoint):
        return {}
    words, width = checkpoint.tensors["qformer.embeddings.word.weight"].shape
    torch.manual_seed(checkpoint.config.train.seed)
    values: dict[str, Tensor] = {
        "temp": torch.tensor([checkpoint.config.loss.temperature]),
        "qformer.head.dense.weight": torch.randn(width, width) * 0.02,
        "qformer.head.dense.bias": torch.zeros(width),
        "qformer.head.norm.weight": torch.ones(width),
        "qformer.head.norm.bias": torch.zeros(width),
        "qformer.head.bias": torch.zeros(words),
    }
    return {name: lazy for name, lazy in lazily(values).items() if name not in checkpoint.tensors}


# -- LAVIS ----------------------------------------------------------------------------------------


def _write_lavis(checkpoint: Checkpoint, output: Path, progress: Progress | None) -> Written:
    """One `.pth` with LAVIS's keys; the language model is left out, as LAVIS itself does."""
    projection = "opt_proj" if checkpoint.config.qformer.instruction is None else "llm_proj"
    if checkpoint.config.stage == "stage2" and language_config(checkpoint.config.language.name).is_encoder_decoder:
        projection = "t5_proj"
    theirs_by_ours = names.lavis(names.depth_of(checkpoint.tensors), projection)
    tensors = {theirs_by_ours[ours]: lazy for ours, lazy in (checkpoint.tensors | _new_parts(checkpoint)).items()}
    tensors["query_tokens"] = tensors["query_tokens"].reshaped(1, *tensors["query_tokens"].shape)
    values: dict[str, Tensor] = {name: lazy.read() for name, lazy in tensors.items()}
    if "temp" in values:
        values["temp"] = values["temp"].reshape(())
        words, bias = "Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions.bias"
        values["Qformer.cls.predictions.decoder.weight"] = values[words]
        values["Qformer.cls.predictions.decoder.bias"] = values[bias]
    if "Qformer.bert.embeddings.position_embeddings.weight" in values:
        positions = values["Qformer.bert.embeddings.position_embeddings.weight"].shape[0]
        values["Qformer.bert.embeddings.position_ids"] = torch.arange(positions)[None]
    notes = ["the language model is not in it, as in LAVIS's own"] if checkpoint.config.stage == "stage2" else []
    encoder, settings = _eva_values(checkpoint)
    values |= encoder
    if not encoder:
        notes.append(f"the image encoder ({checkpoint.config.vision.name}) is not in it")
    config = json.dumps(to_dict(replace(checkpoint.config, out=None, init=None)))
    content = {"model": values, "epoch": 0, "config": {}, "blip2": config}
    torch.save(content | ({"blip2_vision": json.dumps(settings)} if settings else {}), output)
    if progress is not None:
        progress(sum(v.numel() * v.element_size() for v in values.values()))
    return {output: lazily(values)}, notes


def _eva_values(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """EVA's keys of an image encoder that the source brought along, and its config.

    LAVIS itself has the published one, so that a run of a named encoder leaves it out.

    The bias of k goes: it adds the same to every score of a query, which softmax does not see.
    """
    if not (checkpoint.vision or checkpoint.format == "hf" or Path(checkpoint.config.vision.name).is_dir()):
        return {}, None
    tower = vision_tower(checkpoint)
    if tower.config.model_type != "blip_2_vision_model":
        return {}, None
    depth = tower.config.num_hidden_layers
    values = {theirs: tower.tensors[ours].read() for ours, theirs in names.eva(depth).items()}
    for n in range(depth):
        q, _, v = tower.tensors[f"encoder.layers.{n}.self_attn.qkv.bias"].read().chunk(3)
        values[f"visual_encoder.blocks.{n}.attn.q_bias"] = q.clone()
        values[f"visual_encoder.blocks.{n}.attn.v_bias"] = v.clone()
    return values, tower.config.to_dict()
