"""Stage 2 and generation: our side, and transformers' `Blip2ForConditionalGeneration` on the same weights.

Both get image features in place of pixels: the frozen encoder in front is the same for both and left
out. Language models are of a published shape with random weights.

Shape letters: B images, P patches, C channels, Q queries, T text tokens.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.harness.common import Size
from benchmarks.harness.worker import Outputs, Side
from benchmarks.sides import ids, models
from benchmarks.sides.ours import load_batch
from blip2.configs import DecodingConfig, LanguageConfig, OptimConfig, RunConfig
from blip2.inference import Blip2
from blip2.models.freezing import freeze
from blip2.models.language.model import LanguageModel
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder
from blip2.ops.devices import autocast
from blip2.training.objectives.common import EarlyBackward
from blip2.training.objectives.stage2 import Stage2Objective
from blip2.training.optim import build_optimizer
from blip2.weights import names

PROMPT = "11 12 13 14"  # "a photo of" is three or four tokens
QUESTION = "21 22 {} 23 24"
END = 2
GRADIENTS = ("ln_vision.weight", "qformer.query_tokens", "qformer.layers.0.cross_attention.key.weight")
CAPTION = DecodingConfig(beams=5, min_tokens=8, max_tokens=30)
ANSWER = DecodingConfig(beams=5, min_tokens=1, max_tokens=10, length_penalty=-1.0)


# -- weights --------------------------------------------------------------------------------------


def text_config(shape: str) -> Any:
    """A language model's config: `opt-125m`, `smollm2-135m`, or either with `tiny-` before it."""
    from transformers import LlamaConfig, OPTConfig

    tiny = shape.startswith("tiny-")
    common: dict[str, Any] = {"pad_token_id": ids.PAD, "bos_token_id": 1, "eos_token_id": END}
    if shape.endswith("opt-125m"):
        width, depth, heads, vocab = (48, 2, 4, 400) if tiny else (768, 12, 12, 50272)
        sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
        sizes |= {"num_hidden_layers": depth, "num_attention_heads": heads, "vocab_size": vocab}
        return OPTConfig(**sizes, **common, max_position_embeddings=2048, dropout=0.0)
    width, depth, heads, groups, inner, vocab = (48, 2, 4, 2, 96, 400) if tiny else (576, 30, 9, 3, 1536, 49152)
    sizes = {"hidden_size": width, "intermediate_size": inner, "vocab_size": vocab}
    sizes |= {"num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": groups}
    return LlamaConfig(**sizes, **common, tie_word_embeddings=True, max_position_embeddings=8192)


def language_model(shape: str) -> Any:
    """The same random language model in every process, frozen.

    Its blocks are drawn wide enough that what it writes depends on what it reads: with the usual start a
    tied head repeats the last token whatever the image, and equal ids would prove nothing.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(text_config(shape), dtype=torch.float32)
    models.shake(model)
    embedded = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter is not embedded:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model.requires_grad_(False).eval()


def _stage2(size: Size, shape: str, vision: nn.Module | None = None) -> Stage2:
    return Stage2(models.qformer(size, text=False), LanguageModel(language_model(shape)), vision)


def write_stage2(folder: str | Path, size: Size, shape: str) -> None:
    """Random weights of ln_vision, Q-Former and projection."""
    torch.manual_seed(0)
    width = text_config(shape).hidden_size
    weights = nn.ModuleDict(
        {
            "ln_vision": nn.LayerNorm(size.channels),
            "qformer": models.qformer(size, text=False),
            "language_proj": nn.Linear(size.width, width),
        }
    )
    models.shake(weights)
    with torch.no_grad():
        for layer in weights["qformer"].layers:  # queries that tell random images apart
            if layer.cross_attention is not None:
                layer.cross_attention.output.weight *= 20
                layer.cross_attention.value.weight *= 5
    save_file(weights.state_dict(), Path(folder) / models.WEIGHTS)


def _ours(settings: dict[str, Any], vision: nn.Module | None = None) -> Stage2:
    model = _stage2(models.size_of(settings), settings["shape"], vision)
    report = model.load_state_dict(load_file(Path(settings["folder"]) / models.WEIGHTS), strict=False)
    assert not [name for name in report.missing_keys if not name.startswith(("language_model.", "vision."))]
    return model.to(device=settings["device"], dtype=models.weights_dtype(settings))


class _Features(nn.Module):
    """In place of the image encoder: `pixel_values` are features already; the norm behind it stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        normed = self.post_layernorm(pixel_values.to(self.post_layernorm.weight.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=normed, pooler_output=normed[:, 0])


def _transformers(settings: dict[str, Any]) -> Any:
    """`Blip2ForConditionalGeneration` with our weights."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    size, text = models.size_of(settings), text_config(settings["shape"])
    small = {"hidden_size": size.channels, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    qformer = {
        "vocab_size": size.words + 1,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
        "encoder_hidden_size": size.channels,
        "max_position_embeddings": size.positions,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = Blip2Config(
        vision_config=small | {"image_size": 28},
        qformer_config=qformer,
        text_config=text.to_dict(),
        num_query_tokens=size.queries,
        image_token_index=text.vocab_size - 1,
    )
    model = Blip2ForConditionalGeneration(config)
    model.vision_model = _Features(size.channels)
    model.language_model = language_model(settings["shape"])
    both = names.huggingface(size.depth)
    stored = {both[ours]: value for ours, value in load_file(Path(settings["folder"]) / models.WEIGHTS).items()}
    stored["query_tokens"] = stored["query_tokens"][None]
    report = model.load_state_dict(stored, strict=False)
    assert not report.unexpected_keys
    assert not [name for name in report.missing_keys if not name.startswith("language_model.")], report.missing_keys
    return model.to(device=settings["device"], dtype=models.weights_dtype(settings))


def _with_images(model: Any, token_ids: Tensor, mask: Tensor, lead: Tensor) -> dict[str, Tensor]:
    """transformers' inputs: `lead` columns of padding, then the image tokens, then text; row by row."""
    images = torch.full((model.config.num_query_tokens,), model.config.image_token_id)
    rows, masks = [], []
    for row, real, pads in zip(token_ids, mask.long(), lead.tolist(), strict=True):
        rows.append(torch.cat([row[:pads], images, row[pads:]]))
        masks.append(torch.cat([real[:pads], torch.ones_like(images), real[pads:]]))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


# -- the training step ----------------------------------------------------------------------------


def step_ours(settings: dict[str, Any]) -> Side:
    """One stage-2 step of ours: soft prompts, loss on the caption, AdamW."""
    model, batch = _ours(settings), load_batch(settings)
    device = torch.device(settings["device"])
    tokenizer: Any = ids.LanguageIds(END, 32)
    objective = EarlyBackward(Stage2Objective(model, tokenizer, LanguageConfig(prompt=PROMPT))).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(trained.items(), OptimConfig())

    def loss() -> Tensor:
        with autocast(device, settings["precision"]):
            value: Tensor = objective(batch, 0)["lm"]
        return value

    def named(name: str) -> Tensor:
        grad = trained[name].grad
        assert grad is not None
        return grad

    return _step(loss, named, optimizer)


def step_transformers(settings: dict[str, Any]) -> Side:
    """The same step as a user of transformers writes it: labels, `loss.backward()`, AdamW."""
    model, batch = _transformers(settings).train(), load_batch(settings)
    model.language_model.eval()  # frozen: no dropout
    device = torch.device(settings["device"])
    token_ids, mask, labels = ids.LanguageIds(END, 32).targets([PROMPT] * len(batch), batch.captions)
    inputs = _with_images(model, token_ids, mask, torch.zeros(len(batch), dtype=torch.int64))
    front = torch.zeros(len(batch), model.config.num_query_tokens, dtype=torch.bool)
    inputs["labels"] = inputs["input_ids"].masked_fill(~torch.cat([front, labels], dim=1), -100)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": [p for p in trained.values() if p.ndim >= 2]}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05)
    both = names.huggingface(models.size_of(settings).depth)

    def loss() -> Tensor:
        with autocast(device, settings["precision"]):
            value: Tensor = model(pixel_values=batch.features, **inputs).loss
        return value

    def named(name: str) -> Tensor:
        grad = trained[both[name]].grad
        assert grad is not None
        return grad[0] if name == "qformer.query_tokens" else grad

    return _step(loss, named, optimizer)


def _step(loss: Any, grad: Any, optimizer: torch.optim.Optimizer) -> Side:
    """A training step around a loss, and its check."""

    def check() -> Outputs:
        value = loss()
        value.backward()
        gradients = {name: grad(name).float().cpu().numpy() for name in GRADIENTS}
        optimizer.zero_grad()
        return {"loss": value.detach().float().cpu().numpy(), **gradients}

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side(run, check)


# -- generation -----------------------------------------------------------------------------------


class _Table(nn.Module):
    """In place of the image encoder: the features of an image by its number, which is its colour."""

    def __init__(self, features_IPC: Tensor) -> None:
        super().__init__()
        self.register_parameter("features", nn.Parameter(features_IPC, requires_grad=False))

    def forward(self, pixel_values: Tensor) -> Any:
        number = (pixel_values.float().mean(dim=(1, 2, 3)) * 255).round().long()
        return SimpleNamespace(last_hidden_state=self.features[number])


def _images(count: int) -> list[bytes]:
    """Image n: a square of colour (n, n, n)."""
    files = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (28, 28), (number,) * 3).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def generate_ours(settings: dict[str, Any]) -> Side:
    """`Blip2.caption` and `Blip2.ask`."""
    batch, questions = load_batch(settings), settings["questions"]
    assert batch.features is not None
    grid = {"width": batch.features.shape[2], "size": 14 * int((batch.features.shape[1] - 1) ** 0.5), "patch": 14}
    vision = VisionEncoder(_Table(batch.features), mean=(0.0,) * 3, std=(1.0,) * 3, **grid)
    freeze(vision)
    stage2 = _ours(settings, vision).eval()
    language = LanguageConfig(prompt=PROMPT, question=QUESTION)
    model = Blip2(RunConfig(stage="stage2", language=language), stage2=stage2, batch=len(batch))
    model.__dict__["language_tokenizer"] = ids.LanguageIds(END, 32)
    images = _images(len(batch))
    asked = [p for p in images for _ in range(len(questions) // len(images))] if questions else []

    def run() -> list[str]:
        with autocast(torch.device(settings["device"]), settings["precision"]):
            if questions:
                return model.ask(asked, questions, decoding=ANSWER)
            return model.caption(images, decoding=CAPTION)

    def check() -> Outputs:
        texts = run()
        assert len(set(texts)) > 1, "every row is the same: equal ids would prove nothing"
        return _padded_ids(ids.rows_of(texts, 1000))

    return Side(run, check)


def generate_transformers(settings: dict[str, Any]) -> Side:
    """`Blip2ForConditionalGeneration.generate`, in batches of the same number of rows."""
    model, batch = _transformers(settings).eval(), load_batch(settings)
    assert batch.features is not None
    questions, config = settings["questions"], ANSWER if settings["questions"] else CAPTION
    each = len(questions) // len(batch) if questions else 1
    texts = [QUESTION.format(question) for question in questions] or [PROMPT] * len(batch)
    device, size = torch.device(settings["device"]), len(batch)

    def some(start: int) -> list[list[int]]:
        token_ids, mask = ids.LanguageIds(END, 32).prompts(texts[start : start + size])
        inputs = _with_images(model, token_ids, mask, (~mask).sum(1))
        rows = torch.arange(start, start + len(token_ids)) // each
        assert batch.features is not None
        out = model.generate(
            batch.features[rows.to(device)],
            **{name: value.to(device) for name, value in inputs.items()},
            num_beams=config.beams,
            min_new_tokens=config.min_tokens,
            max_new_tokens=config.max_tokens,
            length_penalty=config.length_penalty,
            eos_token_id=END,
            pad_token_id=ids.PAD,
            do_sample=False,
        )
        prompt = inputs["input_ids"]
        whole = out.shape[1] > prompt.shape[1] and torch.equal(out[:, : prompt.shape[1]].cpu(), prompt)
        rows = (out[:, prompt.shape[1] :] if whole else out).tolist()
        return [row[: row.index(END)] if END in row else row for row in rows]

    def run() -> list[list[int]]:
        with autocast(device, settings["precision"]):
            return [row for start in range(0, len(texts), size) for row in some(start)]

    return Side(run, lambda: _padded_ids(run()))


def _padded_ids(rows: list[list[int]]) -> Outputs:
    out = np.full((len(rows), CAPTION.max_tokens), -1)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return {"ids": out}
