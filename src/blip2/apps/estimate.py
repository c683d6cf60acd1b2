"""`blip2 estimate`: parameters and memory of a run, without weights, hub or accelerator.

The whole model is built on the meta device from the towers' configs, and its activations are
counted there (`blip2.apps.activations`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from blip2.apps.activations import TEXT_TOKENS, Machine, activation_curve
from blip2.configs import RunConfig
from blip2.errors import ConfigError
from blip2.models import hub, towers
from blip2.models.build import build_qformer
from blip2.models.freezing import parameter_table
from blip2.models.language_model import language_model_from_config
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision_encoder import vision_encoder_from_config

BATCHES = (1, 8, 16, 32, 64, 128)
# A weight in float32, its gradient, and AdamW's two moments.
TRAINED_BYTES = {"weight": 4, "gradient": 4, "adamw": 8}
# Frozen models with more parameters than this are taken to run on an accelerator.
CPU_LIMIT = 500_000_000

_SETTINGS = {"vision": "vision.name", "bert": "qformer.init", "language": "language.name"}


def estimate(config: RunConfig, as_json: bool = False, *, accelerator: bool | None = None) -> str:
    """Parameter table and memory per batch size of a run, as text for people or one JSON object.

    Args:
        accelerator: whether it runs on one; None takes `train.device`, where `auto` means one if
            there is one here or the frozen models are too large for a CPU.

    Raises:
        ConfigError: a model that is neither a named one nor a folder, or does not fit its place.
    """
    numbers = measure(config, accelerator=accelerator)
    return json.dumps(numbers) if as_json else _text(numbers)


def measure(config: RunConfig, *, accelerator: bool | None = None) -> dict[str, Any]:
    """The numbers behind `estimate`, ready for JSON.

    Returns:
        `recipe`, `stage`, `parameters` by part, their sums `trained` and `frozen`, `memory` of one
        process by size of the micro-batch in GB of 1e9 bytes, and the `assumptions`.
    """
    model = build_on_meta(config)
    rows = parameter_table(model)
    trained, frozen = sum(r.trainable for r in rows), sum(r.frozen for r in rows)
    if accelerator is None:
        wanted = torch.cuda.is_available() or frozen > CPU_LIMIT
        accelerator = wanted if config.train.device == "auto" else config.train.device != "cpu"
    machine = Machine.of(config, accelerator)
    weights = trained * sum(TRAINED_BYTES.values()) + frozen * machine.frozen.itemsize
    activations, memory = activation_curve(model, config, machine), []
    for batch in sorted({*BATCHES, config.train.batch // config.train.accumulate}):
        sizes = {"weights_gb": weights, "activations_gb": activations(batch)}
        sizes["total_gb"] = sum(sizes.values())
        memory.append({"batch": batch, **{name: round(size / 1e9, 3) for name, size in sizes.items()}})
    return {
        "recipe": config.recipe,
        "stage": config.stage,
        "parameters": [{"part": r.name, "trained": r.trainable, "frozen": r.frozen} for r in rows],
        "trained": trained,
        "frozen": frozen,
        "memory": memory,
        "assumptions": {
            "device": "accelerator" if accelerator else "cpu",
            "autocast": "bf16" if machine.autocast else None,
            "bytes_per_trained_parameter": TRAINED_BYTES,
            "bytes_per_frozen_parameter": machine.frozen.itemsize,
            "text_tokens": TEXT_TOKENS,
            "processes": 1,
            "recipe_batch": config.train.batch,
            "accumulate": config.train.accumulate,
        },
    }


def build_on_meta(config: RunConfig) -> Stage1 | Stage2:
    """The model of a run's stage in train mode and without memory, its towers from their configs alone."""
    vision, bert = _tower(config.vision.name, "vision"), _tower(config.qformer.init, "bert")
    language = _tower(config.language.name, "language") if config.stage == "stage2" else None
    with torch.device("meta"), hub.quiet():
        encoder = vision_encoder_from_config(
            vision,
            layer=config.vision.layer,
            pool=config.vision.pool,
            size=config.vision.image_size,
            name=config.vision.name,
        )
        qformer = build_qformer(config.qformer, encoder.width, bert, text=language is None)
        if language is None:
            return Stage1(qformer, encoder, embed_dim=config.qformer.embed_dim).train()
        return Stage2(qformer, language_model_from_config(language), encoder).train()


def _tower(name: str, kind: str) -> Any:
    """transformers config of a named model or of a folder.

    Raises:
        ConfigError: neither of them, or a model of another kind.
    """
    setting = _SETTINGS[kind]
    tower = towers.TOWERS.get(name)
    if tower is not None:
        if tower.kind != kind:
            raise ConfigError(f"{setting} is {name!r}: that is a {tower.kind} model, not a {kind} one")
        return tower.config()
    if not Path(name).is_dir():
        known = ", ".join(n for n, t in towers.TOWERS.items() if t.kind == kind)
        raise ConfigError(
            f"{setting} is {name!r}: its config cannot be read here, for that is no folder and none of {known}; "
            "download the model and give its folder"
        )
    config = hub.load_config(name)
    if kind == "bert" and config.model_type != "bert":
        raise ConfigError(f"{setting} is {name!r}: a {config.model_type} checkpoint, not a BERT-type one")
    return config


def _text(numbers: dict[str, Any]) -> str:
    """The tables for people."""
    given = numbers["assumptions"]
    lines = [f"{numbers['recipe']} ({numbers['stage']})", "", f"{'part':<16}{'trained':>14}{'frozen':>16}"]
    rows = [(r["part"], r["trained"], r["frozen"]) for r in numbers["parameters"]]
    for part, trained, frozen in [*rows, ("total", numbers["trained"], numbers["frozen"])]:
        lines.append(f"{part:<16}{trained:>14,}{frozen:>16,}")
    lines += ["", f"{'GB per process':<24}{'weights':>10}{'activations':>13}{'total':>10}"]
    own = given["recipe_batch"] // given["accumulate"]
    for row in numbers["memory"]:
        label = f"batch {row['batch']}" + (" (recipe)" if row["batch"] == own else "")
        lines.append(f"{label:<24}{row['weights_gb']:>10.2f}{row['activations_gb']:>13.2f}{row['total_gb']:>10.2f}")
    return "\n".join([*lines, "", *_assumed(given)])


def _assumed(given: dict[str, Any]) -> list[str]:
    precision = "bf16 autocast" if given["autocast"] else "fp32"
    trained = sum(given["bytes_per_trained_parameter"].values())
    return [
        f"Assumed: {given['device']}, {precision}; {trained} bytes per trained parameter (fp32 weight, gradient,",
        f"AdamW), {given['bytes_per_frozen_parameter']} per frozen one; texts of {given['text_tokens']} tokens; "
        "one process (DDP adds 4 bytes per trained",
        "parameter). Kernels' workspace and fragmentation come on top.",
    ]
