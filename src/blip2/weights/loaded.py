"""The parts of a loaded model that all its uses need: stages, tokenizers, image features, soft prompts.

Shape letters: B images, N texts, Q queries, T text tokens, P patches, C image-encoder channels,
E contrastive width, H language-model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from blip2.configs import RunConfig
from blip2.data.film import FRAMES, SampleLike, open_sample
from blip2.data.images import ImageLike, ImageSpec, listed, open_image, plain_view
from blip2.data.tokenizers import InstructionReader, LanguageTokenizer, QFormerTokenizer, clean_caption
from blip2.errors import ConfigError
from blip2.models import towers
from blip2.models.build import build_stage1
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision.encoder import VisionEncoder
from blip2.ops.devices import to_host
from blip2.weights.formats import stage1_behind
from blip2.weights.lazy_tensors import Tensors
from blip2.weights.loading import LoadReport, fill

StageT = TypeVar("StageT", Stage1, Stage2)


class LoadedModel:
    """One stage or both, and what feeds them.

    Attributes:
        frames: images that a film is drawn as, from `vision.frames`.

    Args:
        config: of the run.
        stage1, stage2: one or both; a missing stage 1 is loaded from `config.init` when first needed.
        batch: images that go through the model together.
        home: where the run was loaded from; runs that moved together find each other by name.
        report: what was loaded, left out, started fresh and reshaped.
        dtype: of the Q-Former of a stage 1 that is loaded when it is first needed.
        stage1_tensors: the checkpoint that `stage1` was filled from, in its own precision.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        stage1: Stage1 | None = None,
        stage2: Stage2 | None = None,
        batch: int = 16,
        home: Path | None = None,
        report: LoadReport | None = None,
        dtype: torch.dtype = torch.float32,
        stage1_tensors: Tensors | None = None,
    ) -> None:
        self.config, self.batch, self.home, self.report = config, batch, home, report
        self.dtype, self.stage1_tensors = dtype, stage1_tensors or {}
        self._stage1, self.stage2 = stage1, stage2
        self._stage1_config = config  # of `_stage1`
        main = stage2 or stage1
        if main is None or not isinstance(main.vision, VisionEncoder):
            raise ConfigError("a model needs a stage and its image encoder")
        self.vision = main.vision
        self.frames = config.vision.frames or FRAMES
        self.device = main.ln_vision.weight.device

    @property
    def stage1(self) -> Stage1:
        """The stage-1 model; loaded from the run that stage 2 began from when it is first needed."""
        if self._stage1 is None:
            if not self.config.init:
                raise ConfigError(
                    "this is stage 2 and names no stage 1 (init): embeddings and matches need a stage-1 checkpoint"
                )
            checkpoint = stage1_behind(self.config.init, self.home)
            if self.config.vision.train or checkpoint.config.vision.train:
                raise ConfigError(
                    "this run or its stage 1 fine-tuned the image encoder: "
                    f"load {checkpoint.source} for embeddings and matches"
                )
            self._stage1_config = checkpoint.config
            stage1 = build_stage1(checkpoint.config, self.vision, start=False)
            fill(stage1, checkpoint.source, checkpoint.tensors, checkpoint.allowed)
            self.stage1_tensors = checkpoint.tensors
            self._stage1 = cast(stage1, self.dtype).to(self.device).eval()
        return self._stage1

    @property
    def has_itm(self) -> bool:
        """Whether stage 1 was trained with ITM; without, its matches mean nothing."""
        _ = self.stage1  # loads it and its configuration
        return self._stage1_config.loss.itm > 0

    @cached_property
    def text_tokenizer(self) -> QFormerTokenizer:
        """Tokenizer of the Q-Former's text branch."""
        return QFormerTokenizer(towers.folder(self.config.qformer.init), self.config.qformer.max_text)

    @cached_property
    def language_tokenizer(self) -> LanguageTokenizer:
        """Tokenizer of the language model."""
        assert self.stage2 is not None
        language = self.config.language
        return LanguageTokenizer(
            towers.folder(language.name),
            start=language.start,
            end=language.end,
            max_text=language.max_text,
            encoder_decoder=self.stage2.language_model.encoder_decoder,
        )

    @property
    def image_spec(self) -> ImageSpec:
        """Size, normalisation and resizing that the image encoder expects."""
        vision = self.vision
        return ImageSpec(vision.size, vision.mean, vision.std, self.config.vision.resize, self.frames)

    def features(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Features [B, P, C] of the frozen image encoder."""
        return torch.cat(list(self.batches(images)))

    def encode(self, views: Sequence[Tensor], *, apart: bool = False) -> Tensor:
        """Features [B, P, C] of views [3, S, S] that `image_spec` prepared.

        Args:
            apart: encode each image by itself where its features would otherwise depend on the others by more than
                float32's rounding: on a CPU in bf16, whose kernels sum in an order that depends on the number of rows.
                Text that is generated from them is then the same alone and in a batch.
        """
        pixels_B3SS = torch.stack(list(views)).to(self.device)
        dtype = next(self.vision.parameters()).dtype
        size = rows_at_once(len(views), self.device, dtype) if apart else len(views)
        with torch.no_grad():
            return torch.cat([self.vision(part) for part in pixels_B3SS.split(size)])

    def batches(self, images: ImageLike | Sequence[ImageLike], *, apart: bool = False) -> Iterator[Tensor]:
        """Features of `batch` images at a time; `apart` as in `encode`."""
        images = listed(images)
        for start in range(0, len(images), self.batch):
            views = [plain_view(open_image(image), self.image_spec) for image in images[start : start + self.batch]]
            yield self.encode(views, apart=apart)

    def sample_batches(self, samples: Sequence[SampleLike]) -> Iterator[tuple[list[int], Tensor]]:
        """Features of samples, which may have several images or a film each, where they are encoded `apart`.

        Samples with equally many images go together, up to `batch` images at a time.

        Yields:
            Positions of samples, and their features [B, P, C], or [B, I, P, C] of I images each.
        """
        waiting: dict[int, list[tuple[int, list[Tensor]]]] = {}

        def encoded(images: int) -> tuple[list[int], Tensor]:
            positions, views = zip(*waiting.pop(images), strict=True)
            parts = [self.encode(part, apart=True) for part in _parts([v for own in views for v in own], self.batch)]
            features = torch.cat(parts)
            return list(positions), features if images == 1 else features.unflatten(0, (-1, images))

        for position, sample in enumerate(samples):
            views = [plain_view(image, self.image_spec) for image in open_sample(sample, self.frames)]
            group = waiting.setdefault(len(views), [])
            group.append((position, views))
            if len(group) >= max(1, self.batch // len(views)):
                yield encoded(len(views))
        for images in list(waiting):
            yield encoded(images)

    def text_ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [N, T] of captions for the Q-Former, cleaned where its training cleaned them."""
        ids, mask = self.text_tokenizer([clean_caption(text) for text in texts] if self.config.data.clean else texts)
        return ids.to(self.device), mask.to(self.device)

    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        """Unit-norm text embeddings [N, E], float32 on the CPU."""
        texts, size = [texts] if isinstance(texts, str) else list(texts), 8 * self.batch
        with torch.no_grad():
            parts = [self.stage1.embed_texts(*self.text_ids(texts[n : n + size])) for n in range(0, len(texts), size)]
        return to_host(torch.cat(parts))

    @cached_property
    def instruction_reader(self) -> InstructionReader | None:
        """What the Q-Former of stage 2 reads beside its queries; None where it reads nothing."""
        reads = self.config.qformer.instruction
        return None if reads is None else InstructionReader(self.text_tokenizer, reads)

    def soft_prompts(
        self, features_BPC: Tensor, questions: Sequence[str] | None = None, *, prompts: Sequence[str] | None = None
    ) -> Tensor:
        """Soft prompts [B, Q, H] of stage 2, from features [B, P, C] or [B, I, P, C] of I images each.

        Args:
            questions: one per image, for a Q-Former that reads them; None for captions.
            prompts: what the language model reads behind them, for a Q-Former that reads that; None takes the
                questions.
        """
        assert self.stage2 is not None
        texts, reader = questions if prompts is None else prompts, self.instruction_reader
        read = None if reader is None or texts is None else reader(texts, questions)
        with torch.no_grad():
            return self.stage2.soft_prompts(
                features_BPC, *(x.to(self.device) for x in read or ()), marks=self.image_marks(features_BPC)
            )

    def soft_length(self, images: int) -> int:
        """Soft prompts of a sample of so many images, the texts between them included."""
        template = self.config.language.image_mark
        marks = [] if template is None else self.language_tokenizer.marks(template, images)
        return images * self.config.qformer.queries + sum(map(len, marks))

    def image_marks(self, features_BPC: Tensor) -> list[Tensor]:
        """Ids of the text in front of each of the images of a sample; empty for one image, or without such text."""
        template = self.config.language.image_mark
        if features_BPC.ndim == 3 or template is None:
            return []
        return self.language_tokenizer.marks(template, features_BPC.shape[1])


def _parts(views: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    return (views[n : n + size] for n in range(0, len(views), size))


def cast(stage: StageT, dtype: torch.dtype) -> StageT:
    """The Q-Former of a stage and the layers before and after it in a dtype, in place.

    The heads of stage 1, whose outputs are compared with each other, and its temperature stay in float32.
    """
    for part in (stage.ln_vision, stage.qformer, getattr(stage, "language_proj", None)):
        if part is not None:
            part.to(dtype)
    return stage


def rows_at_once(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many rows may run together where none may change by the others: bf16 kernels of a CPU sum in an order that
    depends on the number of rows."""
    return 1 if device.type == "cpu" and dtype == torch.bfloat16 else rows
