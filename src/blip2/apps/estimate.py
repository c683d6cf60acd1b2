"""`blip2 estimate`: parameters and memory of a run, counted without weights, hub or accelerator.

The whole model is built on the meta device, and what training keeps for the backward pass is
counted there tensor by tensor. Meta tensors know neither autocast
nor fused kernels: `DeviceKernels` keeps what those keep.

Shape letters: B batch, T text tokens, P patches, C image-encoder channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from blip2.configs import LossConfig, RunConfig
from blip2.errors import ConfigError
from blip2.models import hub, towers
from blip2.models.build import build_qformer
from blip2.models.freezing import parameter_table
from blip2.models.language_model import language_model_from_config
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision_encoder import vision_encoder_from_config
from blip2.ops import contrastive, losses
from blip2.training.parallel import fast_bf16

BATCHES = (1, 8, 16, 32, 64, 128)
# A caption with its special tokens; natural ones average 12.
TEXT_TOKENS = 16
# "a photo of": in front of the caption in stage 2, and not predicted.
PROMPT_TOKENS = 3
# A weight in float32, its gradient, and AdamW's two moments.
TRAINED_BYTES = {"weight": 4, "gradient": 4, "adamw": 8}
# Frozen models with more parameters than this are taken to run on an accelerator.
CPU_LIMIT = 500_000_000

_MATMULS = {
    F.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.Tensor.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.einsum,
}
_FLOAT32 = {F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.Tensor.softmax}


@dataclass(frozen=True)
class Machine:
    """What a run is estimated for.

    Args:
        accelerator: a GPU or the like, else a CPU.
        autocast: the trained part runs under bf16 autocast.
        frozen: dtype of the frozen models' weights.
    """

    accelerator: bool
    autocast: bool
    frozen: torch.dtype

    @classmethod
    def of(cls, config: RunConfig, accelerator: bool) -> Machine:
        """As the trainer would choose, on an accelerator or on this computer's CPU."""
        fast = accelerator or fast_bf16(torch.device("cpu"))
        precision = config.train.precision
        return cls(
            accelerator,
            autocast=precision == "bf16" or (precision == "auto" and fast),
            frozen=torch.bfloat16 if fast else torch.float32,
        )


def estimate(config: RunConfig, as_json: bool = False, *, accelerator: bool | None = None) -> str:
    """Parameter table and memory per batch size of a run, as text for people or one JSON object.

    Args:
        accelerator: whether it runs on one; None takes `train.device`, where `auto` is one if
            there is one here or the frozen models are too large for a CPU.

    Raises:
        ConfigError: a model that is neither a named tower nor a folder, or does not fit its place.
    """
    numbers = measure(config, accelerator=accelerator)
    return json.dumps(numbers) if as_json else _text(numbers)


def measure(config: RunConfig, *, accelerator: bool | None = None) -> dict[str, Any]:
    """The numbers behind `estimate`: `recipe`, `stage`, `parameters`, `trained`, `frozen`, `memory`
    (GB of 1e9 bytes, per process and micro-batch) and `assumptions`."""
    model = build_on_meta(config)
    rows = parameter_table(model)
    trained, frozen = sum(r.trainable for r in rows), sum(r.frozen for r in rows)
    if accelerator is None:
        large = torch.cuda.is_available() or frozen > CPU_LIMIT
        accelerator = large if config.train.device == "auto" else config.train.device != "cpu"
    machine = Machine.of(config, accelerator)
    weights = trained * sum(TRAINED_BYTES.values()) + frozen * machine.frozen.itemsize
    activations, memory = activation_curve(model, config, machine), []
    for batch in sorted({*BATCHES, config.train.batch // config.train.accumulate}):
        kept = activations(batch)
        sizes = {"weights_gb": weights, "activations_gb": kept, "total_gb": weights + kept}
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
    """The model of a run's stage in train mode, without memory; frozen models from their configs alone."""
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


def activation_bytes(
    model: Stage1 | Stage2, config: RunConfig, batch: int, machine: Machine, *, text_tokens: int = TEXT_TOKENS
) -> int:
    """Bytes that one micro-batch keeps for its backward pass, counted on a meta model.

    Args:
        text_tokens: real tokens of every text; nothing is padded.
    """
    vision: Any = model.vision
    if isinstance(model, Stage2):
        model.language_model.to(machine.frozen)
    features_BPC = torch.empty(batch, vision.tokens, vision.width, device="meta", dtype=machine.frozen)
    ids_BT = torch.empty(batch, text_tokens, device="meta", dtype=torch.int64)
    # The mask alone has values: lengths are read from it.
    mask_BT = torch.ones(batch, text_tokens, dtype=torch.bool)

    def forward() -> list[Tensor]:
        with DeviceKernels(machine):
            if isinstance(model, Stage2):
                return _stage2_losses(model, features_BPC, ids_BT, mask_BT)
            return _stage1_losses(model, config.loss, features_BPC, ids_BT, mask_BT)

    return saved_bytes(model, forward)


def activation_curve(model: Stage1 | Stage2, config: RunConfig, machine: Machine) -> Callable[[int], int]:
    """`activation_bytes` as a function of the batch size, from three counts.

    Exact from 2 on: the tensors grow linearly with the batch, but for the similarities of ITC,
    which grow with its square.
    """
    at_2, at_3, at_4 = (activation_bytes(model, config, batch, machine) for batch in (2, 3, 4))
    slope, bend = at_3 - at_2, at_4 - 2 * at_3 + at_2
    return lambda batch: at_2 + (batch - 2) * slope + (batch - 2) * (batch - 3) // 2 * bend


def saved_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that `forward` keeps for the backward pass, on any device.

    Counts distinct storages, the module's own parameters and buffers left out.
    """
    own = {t.untyped_storage()._cdata for t in chain(module.parameters(), module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # noqa: F841  (the graph lives until the sum is taken)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def _stage1_losses(
    model: Stage1, loss: LossConfig, features_BPC: Tensor, ids_BT: Tensor, mask_BT: Tensor
) -> list[Tensor]:
    """What `Stage1Objective` computes in one process, with no value read from a meta tensor."""
    out = []
    image_kv = model.project_image(features_BPC)
    images_BQE, cache = model.embed_images(image_kv)
    if loss.itc or loss.itm:
        texts_BE = model.embed_texts(ids_BT, mask_BT)
        i2t_BB = contrastive.query_text_similarity(images_BQE, texts_BE) / model.temp
        t2i_BB = contrastive.text_query_similarity(texts_BE, images_BQE) / model.temp
    if loss.itc:
        targets_BB = contrastive.itc_targets(ids_BT[:, 0], ids_BT[:, 0])
        out.append(losses.itc_loss(i2t_BB, t2i_BB, targets_BB, label_smoothing=loss.itc_smoothing))
    if loss.itm:
        both = model.match_logits(ids_BT.repeat(2, 1), mask_BT.repeat(2, 1), image_kv)
        rows = torch.cat([both, model.match_logits(ids_BT, mask_BT, image_kv.take(ids_BT[:, 0]))])
        out.append(losses.itm_loss(rows, ids_BT.new_zeros(len(rows))))
    if loss.itg:
        at, predicted = losses.next_token_positions(mask_BT)
        logits_MV = model.qformer.decode_text(ids_BT, mask_BT, cache, at)
        out.append(losses.itg_loss(logits_MV, ids_BT[predicted], label_smoothing=loss.itg_smoothing))
    return out


def _stage2_losses(model: Stage2, features_BPC: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> list[Tensor]:
    """What `Stage2Objective` computes; an encoder-decoder gets the text on both sides."""
    prompts_BQH = model.soft_prompts(features_BPC)
    if model.language_model.encoder_decoder:
        return [model.language_model.encoder_decoder_loss(prompts_BQH, ids_BT, mask_BT, ids_BT, mask_BT)]
    labels_BT = mask_BT.clone()
    labels_BT[:, :PROMPT_TOKENS] = False
    return [model.language_model.decoder_loss(prompts_BQH, ids_BT, mask_BT, labels_BT)]


class DeviceKernels(TorchFunctionMode):
    """Makes meta tensors keep for the backward pass what real kernels keep.

    - Fused attention keeps its inputs, its output and one number a row, never the matrix of
      weights, which the decomposition on meta would keep. A CPU has none with dropout.
    - An accelerator's dropout keeps a mask of one byte, a CPU's one of the input's dtype.
    - Autocast: matrix products in bf16 on bf16 copies (kept) of float32 weights; on an
      accelerator layer norm and softmax in float32.
    - A meta tensor asked whether it is all True (are there no paddings?) says no: captions differ
      in length, so language models work with their masks.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self._copies: dict[int, Tensor] = {}  # bf16 weights, by the id of the float32 ones

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self.machine.accelerator:
            return self._dropout(*args, **kwargs)
        if self.machine.autocast and func in _MATMULS:
            args, kwargs = self._cast(args, torch.bfloat16), self._cast(kwargs, torch.bfloat16)
        elif self.machine.autocast and self.machine.accelerator and func in _FLOAT32:
            args, kwargs = self._cast(args, torch.float32), self._cast(kwargs, torch.float32)
        return func(*args, **kwargs)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
    ) -> Tensor:
        if self.machine.autocast:
            q, k, v = self._cast((q, k, v), torch.bfloat16)
        mask = attn_mask.to(q.device) if attn_mask is not None else None
        if dropout_p and not self.machine.accelerator:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, **options)
        out: Tensor = _FusedAttention.apply(q, k, v, mask.to(q.dtype) if mask is not None else None)
        return out

    @staticmethod
    def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, training)[0] if training and p else input

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._cast(v, dtype) for v in value)
        if isinstance(value, dict):
            return {k: self._cast(v, dtype) for k, v in value.items()}
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bfloat16):
            return value
        if value.is_leaf and value.requires_grad and value.dtype != dtype:
            return self._copies.setdefault(id(value), value.to(dtype))
        return value.to(dtype)


class _FusedAttention(torch.autograd.Function):
    """Shapes of a fused attention kernel, and what it keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        N, heads, L, _ = q.shape
        out = q.new_empty(N, L, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(N, heads, L, dtype=torch.float32))
        return out


def _tower(name: str, kind: str) -> Any:
    """transformers config of a named tower or of a folder.

    Raises:
        ConfigError: neither of them, or a model of another kind.
    """
    setting = {"vision": "vision.name", "bert": "qformer.init", "language": "language.name"}[kind]
    tower = towers.TOWERS.get(name)
    if tower is not None:
        if tower.kind != kind:
            raise ConfigError(f"{setting} is {name!r}, which is a {tower.kind} model")
        return tower.config()
    if not Path(name).is_dir():
        known = ", ".join(n for n, tower in towers.TOWERS.items() if tower.kind == kind)
        raise ConfigError(
            f"{setting} is {name!r}: neither a named model nor a folder, so its config cannot be read here; "
            f"download it and name its folder, or take one of {known}"
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
    lines += ["", f"memory per process, GB{'':<3}{'weights':>10}{'activations':>13}{'total':>10}"]
    own = given["recipe_batch"] // given["accumulate"]
    for row in numbers["memory"]:
        label = f"batch {row['batch']}" + (" (recipe)" if row["batch"] == own else "")
        lines.append(f"  {label:<23}{row['weights_gb']:>10.2f}{row['activations_gb']:>13.2f}{row['total_gb']:>10.2f}")
    lines += ["", *_assumed(given)]
    return "\n".join(lines)


def _assumed(given: dict[str, Any]) -> list[str]:
    precision = "bf16 autocast" if given["autocast"] else "fp32"
    return [
        f"assumed: {given['device']}, {precision}, frozen weights {given['bytes_per_frozen_parameter']} bytes each, "
        f"trained {sum(given['bytes_per_trained_parameter'].values())} (fp32 weight, gradient, AdamW),",
        f"texts of {given['text_tokens']} tokens, one process (DDP adds 4 bytes per trained parameter); "
        "without workspace and fragmentation",
    ]
