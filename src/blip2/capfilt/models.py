"""Captioners and rankers behind two small interfaces: ours, and transformers' BLIP and CLIP.

Shape letters: B images, N texts of all images, Q queries, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from blip2.capfilt.settings import CapFiltSettings, Prompt
from blip2.configs import DecodingConfig
from blip2.data.images import ImageSpec, plain_view
from blip2.errors import ConfigError
from blip2.inference import Blip2, load, torch_dtype
from blip2.models import towers
from blip2.models.vision.encoder import normalisation
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import pick_device, to_list
from blip2.weights.formats import located


class Captioner(Protocol):
    """Draws captions."""

    def captions(self, images: Sequence[Image.Image], prompts: Sequence[Prompt], count: int) -> list[list[str]]:
        """`count` captions per image that continue its prompt, drawn with torch's global generator."""


class Ranker(Protocol):
    """Compares images with texts."""

    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Similarity of each image with each of its own texts."""

    def matches(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """ITM probability of each of its own texts."""


class Blip2Model:
    """Our model as captioner, ranker or both: an image is encoded once for captions and scores."""

    def __init__(self, model: Blip2, settings: CapFiltSettings) -> None:
        self.model, self.settings = model, settings
        self._last: tuple[Sequence[Image.Image], Tensor] | None = None

    def captions(self, images: Sequence[Image.Image], prompts: Sequence[Prompt], count: int) -> list[list[str]]:
        """Nucleus samples of the language model; the run's prompt unless another was given."""
        settings = self.settings
        decoding = DecodingConfig(
            beams=1,
            num=count,
            sample=True,
            top_p=settings.top_p,
            temperature=settings.temperature,
            min_tokens=settings.min_tokens,
            max_tokens=settings.max_tokens,
        )
        texts = [self.model.config.language.prompt if prompt.text is None else prompt.text for prompt in prompts]
        drawn = self.model.caption_features(self._features(images), texts, decoding)
        return [
            [" ".join(filter(None, (prompt.kept, text))) for text in own]
            for prompt, own in zip(prompts, drawn, strict=True)
        ]

    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """ITC similarity: the largest dot product over the queries."""
        flat, owners = _flat(texts)
        embedded_BQE = self.model.embed_features(self._features(images))
        similarity_BN = query_text_similarity(embedded_BQE, self.model.embed_texts(flat))
        return _split(similarity_BN[owners, torch.arange(len(flat))], texts)

    def matches(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """ITM probability, an image's keys and values projected once for its texts."""
        kv = self.model.image_kv(self._features(images))
        device = kv.layers[0][0].device
        return [
            to_list(self.model.match_features(kv.select(torch.tensor([n], device=device)), list(own))) if own else []
            for n, own in enumerate(texts)
        ]

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        if self._last is None or self._last[0] is not images:
            views = [plain_view(image, self.model.image_spec) for image in images]
            self._last = images, self.model.encode(views)
        return self._last[1]


class HuggingFaceBlip:
    """transformers' `BlipForConditionalGeneration` as captioner; `generate` encodes an image once for its samples."""

    def __init__(self, source: str, settings: CapFiltSettings, device: str) -> None:
        from transformers import BlipForConditionalGeneration

        self.settings, self.device = settings, device
        self.model, self.tokenizer, self.spec = _load(BlipForConditionalGeneration, source, settings.dtype, device)

    def captions(self, images: Sequence[Image.Image], prompts: Sequence[Prompt], count: int) -> list[list[str]]:
        """Nucleus samples; the prompt is part of the caption, as BLIP writes it. Equal prompts run together."""
        captions: dict[int, list[str]] = {}
        for text in dict.fromkeys(prompt.text for prompt in prompts):
            own = [number for number, prompt in enumerate(prompts) if prompt.text == text]
            captions.update(zip(own, self._drawn([images[number] for number in own], text, count), strict=True))
        return [captions[number] for number in range(len(images))]

    @torch.no_grad()
    def _drawn(self, images: Sequence[Image.Image], text: str | None, count: int) -> list[list[str]]:
        settings = self.settings
        prompt: dict[str, Tensor] = {}
        if text:
            prompt = dict(self.tokenizer([text] * len(images), return_tensors="pt"))
            prompt = {name: prompt[name].to(self.device) for name in ("input_ids", "attention_mask")}
        rows = self.model.generate(
            pixel_values=_pixels(images, self.spec, self.model, self.device),
            **prompt,
            do_sample=True,
            top_p=settings.top_p,
            top_k=0,
            temperature=settings.temperature,
            num_beams=1,
            num_return_sequences=count,
            min_new_tokens=settings.min_tokens,
            max_new_tokens=settings.max_tokens,
        )
        texts = [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return [texts[n : n + count] for n in range(0, len(texts), count)]


class HuggingFaceClip:
    """transformers' `CLIPModel` as ranker, which the paper used."""

    def __init__(self, source: str, settings: CapFiltSettings, device: str) -> None:
        from transformers import CLIPModel

        self.source, self.device = source, device
        self.model, self.tokenizer, self.spec = _load(CLIPModel, source, settings.dtype, device)
        self.length = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Cosine similarity; texts are cut at the model's longest."""
        flat, owners = _flat(texts)
        tokens = self.tokenizer(flat, return_tensors="pt", padding=True, truncation=True, max_length=self.length)
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        text_NE = self.model.text_projection(self.model.text_model(**inputs).pooler_output).float()
        pixels = _pixels(images, self.spec, self.model, self.device)
        image_BE = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output).float()
        cosine_N = torch.nn.functional.cosine_similarity(image_BE[owners.to(self.device)], text_NE)
        return _split(cosine_N, texts)

    def matches(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """CLIP has no ITM head."""
        raise ConfigError(f"itm-threshold: {self.source} is CLIP and has no ITM head: leave it out, or rank by ours")


def open_models(settings: CapFiltSettings, device: str = "auto") -> tuple[Captioner | None, Ranker]:
    """Captioner (None where no captions are drawn) and ranker; one of ours named for both is loaded once.

    Raises:
        CheckpointError: nothing there, damaged, or of another kind.
        ConfigError: a captioner that cannot sample, a ranker that is missing or without ITM.
    """
    place = str(pick_device(device))
    captioner: Captioner | None = None
    if settings.samples or settings.ranker is None:
        captioner = _captioner(settings, place)
    name = settings.ranker
    if name is None or (name == settings.captioner and isinstance(captioner, Blip2Model)):
        if not isinstance(captioner, Blip2Model):
            raise ConfigError(f"{settings.captioner} is BLIP of transformers, which does not rank: give --ranker")
        captioner.model.stage1  # noqa: B018 - loads it: a missing stage 1 is an error before the work begins
        return (captioner if settings.samples else None), captioner
    if model_type(name) == "clip":
        if settings.itm_threshold is not None:
            raise ConfigError(f"itm-threshold: {name} is CLIP and has no ITM head: leave it out, or rank by ours")
        return captioner, HuggingFaceClip(name, settings, place)
    ranker = Blip2Model(load(name, device=place, dtype=settings.dtype), settings)
    ranker.model.stage1  # noqa: B018
    return captioner, ranker


def model_type(source: str) -> str | None:
    """`blip`, `clip`, `blip-2`, ... of a transformers folder or hub id; None for anything else."""
    path = Path(located(source))
    of_transformers = (path / "config.json").is_file() if path.is_dir() else towers.is_id(source) and not path.suffix
    return str(towers.load_config(source).model_type) if of_transformers else None


def _captioner(settings: CapFiltSettings, device: str) -> Captioner:
    name = settings.captioner
    if model_type(name) == "blip":
        return HuggingFaceBlip(name, settings, device)
    model = load(name, device=device, dtype=settings.dtype)
    if model.stage2 is None and settings.samples:
        raise ConfigError(f"{name} is a stage 1, which does not draw captions: give a stage-2 run, or --samples 0")
    return Blip2Model(model, settings)


def _load(kind: Any, source: str, dtype: str | None, device: str) -> tuple[Any, Any, ImageSpec]:
    """A model of transformers in eval mode, its tokenizer, and how it wants its images."""
    from transformers import AutoTokenizer

    config = towers.load_config(source)
    model = towers.load_model(kind, source, config, torch_dtype(dtype) or torch.float32).to(device).eval()
    mean, std = normalisation(config.vision_config, source)
    resize = "crop" if config.model_type == "clip" else "squash"
    with towers.readable(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    return model, tokenizer, ImageSpec(int(config.vision_config.image_size), tuple(mean), tuple(std), resize)


def _pixels(images: Sequence[Image.Image], spec: ImageSpec, model: Any, device: str) -> Tensor:
    return torch.stack([plain_view(image, spec) for image in images]).to(device, model.dtype)


def _flat(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """All texts in one list, and the image [N] that each belongs to."""
    owners = [n for n, own in enumerate(texts) for _ in own]
    return [text for own in texts for text in own], torch.tensor(owners, dtype=torch.int64)


def _split(values_N: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
    rest = iter(to_list(values_N))
    return [[next(rest) for _ in own] for own in texts]
