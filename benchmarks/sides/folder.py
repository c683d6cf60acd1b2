"""Captions of a folder of images by `tiny`: ours, and the same parts put together from transformers' classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import blip2
from benchmarks.harness.worker import Outputs, Side
from blip2.configs import DecodingConfig
from blip2.models import towers
from blip2.weights import names

BATCH = 16
GREEDY = DecodingConfig(beams=1, min_tokens=8, max_tokens=30)


def _files(settings: dict[str, Any]) -> list[Path]:
    return sorted(Path(settings["folder"]).glob("*.jpg"))


def _letters(texts: list[str]) -> Outputs:
    """Texts as numbers, so that they can be compared."""
    letters = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(letters, texts, strict=True):
        row[: len(text)] = [ord(letter) for letter in text]
    return {"texts": letters}


def captions_ours(settings: dict[str, Any]) -> Side:
    """`Blip2.caption` on paths."""
    model, files = blip2.load("tiny", device=settings["device"], dtype="fp32"), _files(settings)
    model.batch = BATCH

    def run() -> list[str]:
        return model.caption(files, decoding=GREEDY)

    return Side(run, lambda: _letters(run()), scale=len(files))


class _Tower(nn.Module):
    """DINOv2, its patches averaged as `tiny` has them, and the norm behind it, as `Blip2VisionModel` ends."""

    def __init__(self, model: nn.Module, pool: int, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.model, self.pool, self.post_layernorm = model, pool, norm

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        x = self.model(pixel_values=pixel_values).last_hidden_state
        side = int((x.shape[1] - 1) ** 0.5)
        grid = F.avg_pool2d(x[:, 1:].transpose(1, 2).unflatten(2, (side, side)), self.pool)
        normed = self.post_layernorm(torch.cat([x[:, :1], grid.flatten(2).transpose(1, 2)], dim=1))
        return BaseModelOutputWithPooling(last_hidden_state=normed, pooler_output=normed[:, 0])


def captions_transformers(settings: dict[str, Any]) -> Side:
    """`Blip2ForConditionalGeneration` with the towers and weights of `tiny`."""
    from transformers import (
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        Blip2Config,
        Blip2ForConditionalGeneration,
    )

    ours = blip2.load("tiny", device="cpu", dtype="fp32")
    config, stage2 = ours.config, ours.stage2
    assert stage2 is not None
    qformer: Any = stage2.qformer
    vision_folder, text_folder = towers.folder(config.vision.name), towers.folder(config.language.name)
    text = AutoModelForCausalLM.from_pretrained(text_folder, dtype=torch.float32)
    small = {"hidden_size": qformer.image_width, "intermediate_size": 16, "num_hidden_layers": 1}
    bert = towers.load_config(config.qformer.init).to_dict() | {
        "encoder_hidden_size": qformer.image_width,
        "cross_attention_frequency": config.qformer.cross_every,
        "model_type": "blip_2_qformer",
    }
    built = Blip2Config(
        vision_config=small | {"num_attention_heads": 1, "image_size": 28},
        qformer_config=bert,
        text_config=text.config.to_dict(),
        num_query_tokens=qformer.num_queries,
        image_token_index=text.config.vocab_size - 1,
    )
    model = Blip2ForConditionalGeneration(built)
    model.vision_model = _Tower(AutoModel.from_pretrained(vision_folder), config.vision.pool, stage2.ln_vision)
    both = names.huggingface(qformer.depth)
    stored = {both[name]: value for name, value in stage2.state_dict().items() if name in both}
    stored["query_tokens"] = stored["query_tokens"][None]
    report = model.load_state_dict(stored, strict=False)
    assert not report.unexpected_keys
    assert not [n for n in report.missing_keys if not n.startswith(("language_model.", "vision_model."))]
    model.language_model = text
    model = model.eval().to(settings["device"])
    size = {"height": ours.vision.size, "width": ours.vision.size}
    processor = AutoImageProcessor.from_pretrained(vision_folder, use_fast=False)
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    prompt = torch.tensor(tokenizer(config.language.prompt)["input_ids"])
    images_Q = torch.full((qformer.num_queries,), model.config.image_token_id)
    files, end = _files(settings), ours.language_tokenizer.end_id

    @torch.inference_mode()
    def some(paths: list[Path]) -> list[str]:
        opened = [Image.open(path).convert("RGB") for path in paths]
        pixels = processor(opened, size=size, do_center_crop=False, return_tensors="pt")["pixel_values"]
        ids = torch.cat([images_Q, prompt]).expand(len(paths), -1).to(settings["device"])
        out = model.generate(
            pixels.to(settings["device"]),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            min_new_tokens=GREEDY.min_tokens,
            max_new_tokens=GREEDY.max_tokens,
            eos_token_id=end,
            pad_token_id=end,
        )
        new = out[:, ids.shape[1] :] if out.shape[1] > ids.shape[1] else out
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def run() -> list[str]:
        return [text for start in range(0, len(files), BATCH) for text in some(files[start : start + BATCH])]

    return Side(run, lambda: _letters(run()), scale=len(files))
