"""`blip2 estimate`: parameters and memory of a run, without weights, hub or accelerator.

The whole model is built on the meta device from the towers' configs, adapters included, and a
training step is run and counted there (`blip2.estimate.step_memory`).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2.configs import QUANTIZE, RunConfig
from blip2.errors import ConfigError
from blip2.estimate.kernels import Machine
from blip2.estimate.optimizer_memory import state_bytes, step_bytes
from blip2.estimate.step_memory import LONGEST_TEXT, TEXT_TOKENS, step_curve
from blip2.models import towers
from blip2.models.build import build_qformer
from blip2.models.freezing import parameter_table
from blip2.models.language.lora import add_lora
from blip2.models.language.model import language_model_from_config
from blip2.models.language.quantize import quantized_bytes, quantized_layers
from blip2.models.qformer.lora import add_qformer_lora
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import LinearBridge, Stage2
from blip2.models.vision.encoder import vision_encoder_from_config

BATCHES = (1, 8, 16, 32, 64, 128)
# In float32.
WEIGHT_BYTES = GRADIENT_BYTES = 4
# What a process on a CPU takes beside its tensors: a share of gradients and activations, which glibc keeps of what
# is freed, and kernels' own buffers in bytes: fitted to what is measured (docs/performance.md).
CPU_KEPT, CPU_BUFFERS = 0.3, 50_000_000
# Cards to fit, in GB of 1e9 bytes, and the share of one that is left to workspace and fragmentation.
CARDS = (16, 24, 40, 80)
LEFT_FREE = 0.1
# Frozen models with more parameters than this are taken to run on an accelerator.
CPU_LIMIT = 500_000_000

_SETTINGS = {"vision": "vision.name", "bert": "qformer.init", "language": "language.name"}


def estimate(config: RunConfig, as_json: bool = False, *, accelerator: bool | None = None) -> str:
    """Parameters, memory per batch size and what fits which card, as text for people or one JSON object.

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
        process by size of the micro-batch in GB of 1e9 bytes, `fits` with the largest micro-batch
        for each of `CARDS` (0, with `advice`, where none fits), and the `assumptions`.
    """
    model = build_on_meta(config)
    rows = parameter_table(model)
    trained, frozen = sum(r.trainable for r in rows), sum(r.frozen for r in rows)
    if accelerator is None:
        by_default = torch.cuda.is_available() or frozen > CPU_LIMIT
        accelerator = by_default if config.train.device == "auto" else config.train.device != "cpu"
    machine, card = Machine.of(config, accelerator), Machine.of(config, True)
    layers = quantized_layers(model.language_model.model) if isinstance(model, Stage2) else []
    state = state_bytes([p for p in model.parameters() if p.requires_grad], config.optim)
    trained_bytes = trained * (WEIGHT_BYTES + GRADIENT_BYTES) + state

    def weights(quantize: str | None, machine: Machine) -> int:
        packed = sum(layer.weight.numel() for layer in layers) if quantize else 0
        quantized = quantized_bytes(layers, quantize) if quantize else 0
        return trained_bytes + (frozen - packed) * machine.frozen.itemsize + quantized

    quantize = config.language.quantize
    activations, memory = _activations(model, config, machine), []
    on_card = activations if machine == card else _activations(model, config, card)
    by_kind = {kind: weights(kind, card) for kind in ((None, *QUANTIZE) if layers else (None,))}
    for batch in sorted({*BATCHES, config.train.batch // config.train.accumulate}):
        sizes = {"weights_gb": weights(quantize, machine), "activations_gb": activations(batch)}
        used = trained * GRADIENT_BYTES + sizes["activations_gb"]
        sizes["workspace_gb"] = 0 if accelerator else int(CPU_KEPT * used) + CPU_BUFFERS
        sizes["total_gb"] = sum(sizes.values())
        memory.append({"batch": batch, **{name: round(size / 1e9, 3) for name, size in sizes.items()}})
    return {
        "recipe": config.recipe,
        "stage": config.stage,
        "parameters": [{"part": r.name, "trained": r.trainable, "frozen": r.frozen} for r in rows],
        "trained": trained,
        "frozen": frozen,
        "memory": memory,
        "fits": [{"card_gb": size, **_fit(size, quantize, by_kind, on_card)} for size in CARDS],
        "assumptions": _assumptions(config, machine, state / trained)
        | {"quantized": _quantized(layers, quantize) if quantize else None},
    }


def _assumptions(config: RunConfig, machine: Machine, state: float) -> dict[str, Any]:
    """What the numbers hold for; `state` is the optimizer's bytes per trained parameter."""
    return {
        "device": "accelerator" if machine.accelerator else "cpu",
        "autocast": "bf16" if machine.autocast else None,
        "optimizer": config.optim.name,
        "bytes_per_trained_parameter": {
            "weight": WEIGHT_BYTES,
            "gradient": GRADIENT_BYTES,
            "optimizer": round(state, 2),
        },
        "bytes_per_frozen_parameter": machine.frozen.itemsize,
        "lora_rank": config.lora.rank or None,
        "text_tokens": TEXT_TOKENS,
        "longest_text": LONGEST_TEXT,
        "texts_per_image": config.data.texts_per_image,
        "token_drop": config.vision.token_drop,
        "workspace": 0.0 if machine.accelerator else CPU_KEPT,
        "buffers_gb": 0.0 if machine.accelerator else CPU_BUFFERS / 1e9,
        "features": "cached" if config.data.cache_features else "encoded",
        "checkpoint": config.train.checkpoint,
        "early_backward": config.train.early_backward,
        "head_chunk": config.train.head_chunk,
        "processes": 1,
        "recipe_batch": config.train.batch,
        "accumulate": config.train.accumulate,
    }


def _activations(model: Stage1 | Stage2, config: RunConfig, machine: Machine) -> Callable[[int], int]:
    """Bytes by size of the micro-batch that the peak of a step takes beyond weights, gradients and state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(GRADIENT_BYTES * p.numel() for p in trained)
    updating = step_bytes(trained, config.optim, machine.accelerator)
    step = step_curve(model, config, machine)
    return lambda batch: max(step(batch) - gradients, updating)


def build_on_meta(config: RunConfig) -> Stage1 | Stage2:
    """The model of a run's stage in train mode and without memory, its towers from their configs alone."""
    vision, bert = _tower(config.vision.name, "vision"), _tower(config.qformer.init, "bert")
    language = _tower(config.language.name, "language") if config.stage == "stage2" else None
    with torch.device("meta"), towers.quiet():
        encoder = vision_encoder_from_config(
            vision,
            layer=config.vision.layer,
            pool=config.vision.pool,
            size=config.vision.image_size,
            name=config.vision.name,
        )
        if config.vision.train:
            encoder.unfreeze()
        if language is None:
            qformer = build_qformer(config.qformer, encoder.width, bert, text=True)
            return Stage1(qformer, encoder, embed_dim=config.qformer.embed_dim).train()
        between: QFormer | LinearBridge = LinearBridge(encoder.width, config.qformer.queries)
        if config.qformer.bridge == "qformer":
            text = config.qformer.instruction is not None
            between = build_qformer(config.qformer, encoder.width, bert, text=text, head=False)
        model = Stage2(between, language_model_from_config(language), encoder, places=config.qformer.image_places)
        if config.lora.rank:
            add_lora(model.language_model, config.lora)
        if config.lora.qformer_rank and isinstance(between, QFormer):
            add_qformer_lora(between, config.lora.qformer_rank, config.lora.alpha)
        return model.train()


def _fit(
    card: int, quantize: str | None, weights: dict[str | None, int], activations: Callable[[int], int]
) -> dict[str, Any]:
    """Largest micro-batch on a card of so many GB, and what to try where there is none.

    Args:
        weights: bytes of weights and optimizer by kind of quantization.
        activations: bytes by size of the micro-batch.
    """
    room = card * 1e9 * (1 - LEFT_FREE)

    def fits(kind: str | None, batch: int, cards: int = 1) -> bool:
        return weights[kind] / cards + activations(batch) <= room

    if fits(quantize, 1):
        low, high = 1, 2
        while fits(quantize, high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(quantize, middle) else (low, middle)
        return {"micro_batch": low, "advice": None}
    smaller = [kind for kind in weights if kind and weights[kind] < weights[quantize] and fits(kind, 1)]
    shards = next((n for n in (2, 4, 8, 16) if fits(None, 1, n)), None)
    if smaller:
        return {"micro_batch": 0, "advice": f"try --language.quantize {smaller[0]}"}
    if shards:
        unquantized = ", without --language.quantize" if quantize else ""
        return {"micro_batch": 0, "advice": f"try {shards} cards and --train.parallel fsdp2{unquantized}"}
    return {"micro_batch": 0, "advice": "take smaller models"}


def _quantized(layers: list[nn.Linear], kind: str) -> dict[str, Any]:
    size = quantized_bytes(layers, kind)
    return {"kind": kind, "parameters": sum(layer.weight.numel() for layer in layers), "gb": round(size / 1e9, 3)}


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
    config = towers.load_config(name)
    if kind == "bert" and config.model_type != "bert":
        raise ConfigError(f"{setting} is {name!r}: a {config.model_type} checkpoint, not a BERT-type one")
    return config


def _text(numbers: dict[str, Any]) -> str:
    """The tables for people."""
    assumed = numbers["assumptions"]
    lines = [f"{numbers['recipe']} ({numbers['stage']})", "", f"{'part':<16}{'trained':>14}{'frozen':>16}"]
    rows = [(r["part"], r["trained"], r["frozen"]) for r in numbers["parameters"]]
    for part, trained, frozen in [*rows, ("total", numbers["trained"], numbers["frozen"])]:
        lines.append(f"{part:<16}{trained:>14,}{frozen:>16,}")
    lines += ["", f"{'GB per process':<24}{'weights':>10}{'activations':>13}{'workspace':>11}{'total':>10}"]
    own = assumed["recipe_batch"] // assumed["accumulate"]
    for row in numbers["memory"]:
        label = f"batch {row['batch']}" + (" (recipe)" if row["batch"] == own else "")
        sizes = f"{row['weights_gb']:>10.2f}{row['activations_gb']:>13.2f}{row['workspace_gb']:>11.2f}"
        lines.append(f"{label:<24}{sizes}{row['total_gb']:>10.2f}")
    lines += ["", f"Largest micro-batch that fits a card, {LEFT_FREE:.0%} of it left free:"]
    for fit in numbers["fits"]:
        answer = f"{fit['micro_batch']:,}" if fit["micro_batch"] else f"does not fit: {fit['advice']}"
        lines.append(f"{fit['card_gb']:>4} GB  {answer}")
    return "\n".join([*lines, "", *_assumed(assumed)])


def _assumed(assumed: dict[str, Any]) -> list[str]:
    precision = "bf16 autocast" if assumed["autocast"] else "fp32"
    each = assumed["bytes_per_trained_parameter"]
    frozen, quantized = f"{assumed['bytes_per_frozen_parameter']} per frozen one", assumed["quantized"]
    if quantized:
        frozen += f" ({quantized['parameters']:,} of them in {quantized['kind']}: {quantized['gb']:.2f} GB)"
    text = (
        f"Assumed: {assumed['device']}, {precision}; {sum(each.values()):g} bytes per trained parameter (fp32 weight, "
        f"gradient, {each['optimizer']:g} of {assumed['optimizer']}), {frozen}; {_settings(assumed)}; one process (DDP "
        f"adds 4 bytes per trained parameter). {_workspace(assumed)}"
    )
    return textwrap.wrap(text, 90)


def _workspace(assumed: dict[str, Any]) -> str:
    if not assumed["workspace"]:
        return "Kernels' workspace and fragmentation come on top."
    return (
        f"Workspace: {assumed['workspace']:.0%} of gradients and activations, which the C library's allocator keeps of "
        f"what is freed, and {1e3 * assumed['buffers_gb']:.0f} MB of kernels' buffers."
    )


def _settings(assumed: dict[str, Any]) -> str:
    """The settings that change what a step holds."""
    settings = [f"texts of {assumed['text_tokens']} tokens, one of {assumed['longest_text']}"]
    if assumed["texts_per_image"] > 1:
        settings.append(f"{assumed['texts_per_image']} of them per image")
    settings.append(f"{assumed['features']} features")
    if assumed["token_drop"]:
        settings.append(f"{assumed['token_drop']:.0%} of the patches dropped")
    if assumed["lora_rank"]:
        settings.append(f"LoRA of rank {assumed['lora_rank']}")
    if assumed["early_backward"]:
        settings.append("the loss run backward in parts")
    if assumed["checkpoint"]:
        settings.append("layers computed again in the backward pass")
    if assumed["head_chunk"]:
        settings.append(f"{assumed['head_chunk']} rows of logits at a time")
    return ", ".join(settings)
