"""A trained bridge at work: captions, answers, embeddings, matches.

    model = blip2.load("runs/s2")
    model.caption(["dog.jpg"])                      # ["a dog runs through the grass"]
    model.ask(["dog.jpg"], ["What animal is it?"])
    model.similarity(["dog.jpg"], ["a dog", "a cat"])   # [1, 2], needs a stage-1 run

Shape letters: B images, N texts, Q queries, T text tokens, P patches, C image-encoder channels,
E contrastive width.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from blip2.configs import DecodingConfig, RunConfig
from blip2.data.images import ImageSpec, decode_image, plain_view
from blip2.data.samples import BadSampleError
from blip2.data.text import LanguageTokenizer, QFormerTokenizer, clean_caption
from blip2.errors import ConfigError, DataError
from blip2.models import towers
from blip2.models.build import build_stage1
from blip2.models.decoding import generate, generate_with_qformer
from blip2.models.qformer import ImageKV
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.models.vision_encoder import VisionEncoder
from blip2.weights.assemble import assemble
from blip2.weights.checkpoints import located, open_checkpoint, stage1_behind
from blip2.weights.loading import LoadReport, fill

if TYPE_CHECKING:
    from blip2.explain import Attention
    from blip2.fewshot import Examples, ShotLike
    from blip2.show import Shown

ImageLike = str | Path | bytes | Image.Image
_QUESTIONS = 4  # questions about repeated images that go together, for each image that does


class Blip2:
    """A loaded model; methods take one image or text, or a list, and work in batches.

    Stage-2 runs caption and answer; embeddings and matches come from the stage-1 run that they
    began from. A stage-1 run captions by itself, through its ITG head.

    Args:
        config: of the run.
        stage1, stage2: the models at hand; a missing stage 1 is loaded from `config.init` when
            first needed.
        batch: images that go through the model together.
        home: where the run was loaded from; runs that moved together find each other by name.
        report: what was loaded, left out, started fresh and reshaped.
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
    ) -> None:
        self.config, self.batch, self.home, self.report = config, batch, home, report
        self._stage1, self.stage2 = stage1, stage2
        main = stage2 or stage1
        if main is None or not isinstance(main.vision, VisionEncoder):
            raise ConfigError("a model needs a stage and its image encoder")
        self.vision = main.vision
        self.device = main.ln_vision.weight.device

    # -- text from images ---------------------------------------------------------------------

    def caption(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        prompt: str | None = None,
        decoding: DecodingConfig | None = None,
        shots: Examples | Sequence[ShotLike] = (),
        **options: Any,
    ) -> list[Any]:
        """Captions of B images.

        Args:
            prompt: text that the caption continues; None takes the run's.
            decoding: how to generate; single options (`beams=1, max_tokens=20`) may be given
                instead.
            shots: examples in front of every image, `{"image", "caption"}` each, or with `question` and
                `answer` (`blip2.fewshot`); a model not trained on sequences may gain nothing by them.

        Returns:
            B strings; with `num` above 1, B lists of `num` strings.
        """
        config = decoding or DecodingConfig(**options)
        if shots:
            text, examples = self.config.language.prompt if prompt is None else prompt, self._examples(shots)
            parts = (examples.generate(chunk, [text] * len(chunk), config) for chunk in self._chunks(images))
        else:
            parts = (self.caption_features(chunk, prompt, config) for chunk in self._chunks(images))
        found = [texts for part in parts for texts in part]
        return found if config.num > 1 else [texts[0] for texts in found]

    def ask(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: str | Sequence[str],
        *,
        decoding: DecodingConfig | None = None,
        shots: Examples | Sequence[ShotLike] = (),
        **options: Any,
    ) -> list[str]:
        """Answers to one question per image (or one question about all).

        An image that comes several times is encoded once, and its soft prompts are read once for all
        its questions by a decoder-only language model.

        Decoding defaults to the paper's for VQA: beam 5, length penalty -1, 1 to 10 tokens.

        Args:
            shots: examples in front of every image, `{"image", "question", "answer"}` each, as in `caption`.
        """
        vqa = {"min_tokens": 1, "max_tokens": 10, "length_penalty": -1.0}
        config = decoding or DecodingConfig(**{**vqa, **options})
        pictures = _listed(images)
        asked = [questions] * len(pictures) if isinstance(questions, str) else list(questions)
        if len(asked) != len(pictures):
            raise ConfigError(f"{len(asked)} questions for {len(pictures)} images: give one per image, or one in all")
        distinct, places = _distinct(pictures)
        # a Q-Former that reads questions has soft prompts of their own for each
        alone = self.stage2 is not None and not self.stage2.reads_questions and not shots
        if alone and len(distinct) < len(pictures):
            return self._ask_repeatedly(distinct, places, asked, config)
        prompts = [self.config.language.question.format(q.strip()) for q in asked]
        write = self._examples(shots).generate if shots else self.generate
        answers: list[str] = []
        for start, features in zip(range(0, len(pictures), self.batch), self._chunks(pictures), strict=True):
            part = slice(start, start + self.batch)
            texts = write(features, prompts[part], config, questions=asked[part])
            answers += [t[0] for t in texts]
        return answers

    def ask_many(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: Sequence[str],
        *,
        decoding: DecodingConfig | None = None,
        **options: Any,
    ) -> list[list[str]]:
        """Answers to every question about every image: B lists, in the order of the questions; see `ask`."""
        pictures, asked = _listed(images), list(questions)
        repeated = [picture for picture in pictures for _ in asked]
        answers = self.ask(repeated, asked * len(pictures), decoding=decoding, **options)
        return [answers[n * len(asked) : (n + 1) * len(asked)] for n in range(len(pictures))]

    def _examples(self, shots: Examples | Sequence[ShotLike]) -> Examples:
        from blip2.fewshot import Examples

        return shots if isinstance(shots, Examples) else Examples(self, shots)

    def _ask_repeatedly(
        self, distinct: list[ImageLike], places: list[int], questions: list[str], config: DecodingConfig
    ) -> list[str]:
        """Answers to questions of which number n is about image `places[n]`."""
        assert self.stage2 is not None
        tokenizer, answers = self.language_tokenizer, [""] * len(questions)
        for start, features in zip(range(0, len(distinct), self.batch), self._chunks(distinct), strict=True):
            with torch.no_grad():
                soft = self.stage2.soft_prompts(features)
            about = [n for n, place in enumerate(places) if start <= place < start + self.batch]
            for first in range(0, len(about), _QUESTIONS * self.batch):
                rows = about[first : first + _QUESTIONS * self.batch]
                used = sorted({places[n] - start for n in rows})
                prompts = [self.config.language.question.format(questions[n].strip()) for n in rows]
                ids, mask = (x.to(self.device) for x in tokenizer.prompts(prompts))
                out = generate(
                    self.stage2.language_model,
                    soft[used],
                    ids,
                    mask,
                    config,
                    end_id=tokenizer.end_id,
                    pad_id=tokenizer.pad_id,
                    images_B=torch.tensor([used.index(places[n] - start) for n in rows], device=self.device),
                )
                for n, ids in zip(rows, out[:: config.num].tolist(), strict=True):
                    answers[n] = tokenizer.decode(ids)
        return answers

    def rank_answers(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: str | Sequence[str],
        candidates: Sequence[str],
    ) -> list[str]:
        """The candidate that the language model finds most likely as the answer to each question.

        Candidates are compared by the sum of their tokens' log-probabilities, end token included.
        """
        if self.stage2 is None:
            raise ConfigError("this run is stage 1 and has no language model: questions need a stage-2 run")
        pictures = _listed(images)
        asked = [questions] * len(pictures) if isinstance(questions, str) else list(questions)
        best: list[str] = []
        for start, features in zip(range(0, len(pictures), self.batch), self._chunks(pictures), strict=True):
            prompts = [self.config.language.question.format(q.strip()) for q in asked[start : start + self.batch]]
            with torch.no_grad():
                soft = self.soft_prompts(features, asked[start : start + self.batch])
                likely = torch.stack([self._likelihood(soft, prompts, [c] * len(prompts)) for c in candidates])
            best += [candidates[n] for n in likely.argmax(dim=0).tolist()]
        return best

    def log_likelihood(
        self,
        features_BPC: Tensor,
        prompts: Sequence[str],
        texts: Sequence[str],
        *,
        questions: Sequence[str] | None = None,
    ) -> Tensor:
        """Log-probability [B] of a text after each prompt, its end token included."""
        with torch.no_grad():
            return self._likelihood(self.soft_prompts(features_BPC, questions), list(prompts), list(texts))

    def _likelihood(self, soft_BQH: Tensor, prompts: list[str], texts: list[str]) -> Tensor:
        assert self.stage2 is not None
        tokenizer, model = self.language_tokenizer, self.stage2.language_model
        if model.encoder_decoder:
            parts = tuple(x.to(self.device) for x in tokenizer.pairs(prompts, texts))
            loss_M, rows = model.encoder_decoder_loss(soft_BQH, *parts, reduction="none"), parts[3]
        else:
            parts = tuple(x.to(self.device) for x in tokenizer.targets(prompts, texts))
            loss_M, rows = model.decoder_loss(soft_BQH, *parts, reduction="none"), parts[2]
        at_M = rows.nonzero()[:, 0]
        return loss_M.new_zeros(len(prompts)).index_add(0, at_M, -loss_M)

    def caption_features(self, features_BPC: Tensor, prompt: str | None, config: DecodingConfig) -> list[list[str]]:
        """Captions from image features: B lists of `config.num` strings."""
        if self.stage2 is None:
            return [[text] for text in self._caption_with_qformer(features_BPC, config)]
        prompt = self.config.language.prompt if prompt is None else prompt
        return self.generate(features_BPC, [prompt] * len(features_BPC), config)

    def soft_prompts(self, features_BPC: Tensor, questions: Sequence[str] | None = None) -> Tensor:
        """Soft prompts [B, Q, H]; a Q-Former that reads questions is given them."""
        assert self.stage2 is not None
        if questions is None or not self.stage2.reads_questions:
            return self.stage2.soft_prompts(features_BPC)
        return self.stage2.soft_prompts(
            features_BPC, *(x.to(self.device) for x in self.text_tokenizer(list(questions)))
        )

    def generate(
        self,
        features_BPC: Tensor,
        prompts: list[str],
        config: DecodingConfig,
        *,
        questions: Sequence[str] | None = None,
    ) -> list[list[str]]:
        """What the language model writes after each prompt, seeing the image: B lists of strings.

        Args:
            questions: for a Q-Former that reads them; one per image.
        """
        if self.stage2 is None:
            raise ConfigError("this run is stage 1 and has no language model: questions need a stage-2 run")
        tokenizer = self.language_tokenizer
        with torch.no_grad():
            soft = self.soft_prompts(features_BPC, questions)
            ids, mask = (x.to(self.device) for x in tokenizer.prompts(prompts))
            out = generate(
                self.stage2.language_model, soft, ids, mask, config, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id
            )
        texts = [tokenizer.decode(row) for row in out.tolist()]
        return [texts[n : n + config.num] for n in range(0, len(texts), config.num)]

    def _caption_with_qformer(self, features_BPC: Tensor, config: DecodingConfig) -> list[str]:
        tokenizer = self.text_tokenizer
        with torch.no_grad():
            kv = self.stage1.project_image(features_BPC)
            rows = generate_with_qformer(
                self.stage1.qformer,
                kv,
                dec_id=tokenizer.dec_id,
                end_id=tokenizer.sep_id,
                min_tokens=config.min_tokens,
                max_tokens=config.max_tokens,
            )
        return [tokenizer.decode(row) for row in rows]

    # -- embeddings and matches (stage 1) -------------------------------------------------------

    def embed_images(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Unit-norm query embeddings [B, Q, E] (32 x 256 at the paper's sizes), float32 on the CPU."""
        return torch.cat([self.embed_features(chunk) for chunk in self._chunks(images)])

    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        """Unit-norm text embeddings [N, E], float32 on the CPU."""
        listed = [texts] if isinstance(texts, str) else list(texts)
        size = 8 * self.batch
        with torch.no_grad():
            parts = [self.stage1.embed_texts(*self.text_ids(listed[n : n + size])) for n in range(0, len(listed), size)]
        return torch.cat(parts).float().cpu()

    def embed_features(self, features_BPC: Tensor) -> Tensor:
        """Query embeddings [B, Q, E] from image features."""
        with torch.no_grad():
            embedded, _ = self.stage1.embed_images(self.stage1.project_image(features_BPC))
        return embedded.float().cpu()

    def similarity(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Tensor:
        """ITC similarity [B, N] in [-1, 1]: the largest dot product over an image's queries."""
        from blip2.ops.contrastive import query_text_similarity

        return query_text_similarity(self.embed_images(images), self.embed_texts(texts))

    def match(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Tensor:
        """ITM probability [B] that text i describes image i (one text may stand for all)."""
        pictures = _listed(images)
        listed = [texts] * len(pictures) if isinstance(texts, str) else list(texts)
        if len(listed) != len(pictures):
            raise ConfigError(f"{len(listed)} texts for {len(pictures)} images: give one per image, or one in all")
        found = []
        for start, features in zip(range(0, len(pictures), self.batch), self._chunks(pictures), strict=True):
            found.append(self.match_features(self.image_kv(features), listed[start : start + self.batch]))
        return torch.cat(found)

    def image_kv(self, features_BPC: Tensor) -> ImageKV:
        """An image's keys/values for many texts: project once, match often."""
        with torch.no_grad():
            return self.stage1.project_image(features_BPC)

    def match_logits(self, image_kv: ImageKV, texts: list[str]) -> Tensor:
        """ITM logits [N, 2], class 1 a match; text n is paired with image n mod B."""
        with torch.no_grad():
            return self.stage1.match_logits(*self.text_ids(texts), image_kv).float().cpu()

    def match_features(self, image_kv: ImageKV, texts: list[str]) -> Tensor:
        """ITM probabilities [N]; text n is paired with image n mod B."""
        return self.match_logits(image_kv, texts).softmax(dim=-1)[:, 1]

    def attend(self, image: ImageLike, text: str | None = None) -> Attention:
        """Where the model looks in one image, and with a text (needs stage 1) what its scores depend on."""
        from blip2.explain import attend

        return attend(self, image, text)

    def show(
        self,
        images: ImageLike | Sequence[ImageLike],
        questions: str | Sequence[str] = (),
        *,
        text: str | None = None,
        maps: bool | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Shown:
        """What the model says of B pictures, as cards that a notebook shows and a terminal prints.

        Args:
            questions: asked of every picture (needs stage 2).
            text: scored against every picture, with maps of what the scores depend on (needs stage 1).
            maps: where the model looked; None shows them where there is a text.
            prompt: text that the captions continue; None takes the run's.
            options: of the captions' decoding (`num=3, beams=1`), see `DecodingConfig`.
        """
        from blip2.show import show

        return show(self, images, questions, text=text, maps=maps, prompt=prompt, **options)

    # -- parts ----------------------------------------------------------------------------------

    @property
    def stage1(self) -> Stage1:
        """The stage-1 model; loaded from the run that stage 2 began from when it is first needed."""
        if self._stage1 is None:
            if not self.config.init:
                raise ConfigError(
                    "this is stage 2 and names no stage 1 (init): embeddings and matches need a stage-1 checkpoint"
                )
            found = stage1_behind(self.config.init, self.home)
            if self.config.vision.train or found.config.vision.train:
                raise ConfigError(
                    f"this run or its stage 1 fine-tuned the image encoder: load {found.source} for embeddings and "
                    "matches"
                )
            stage1 = build_stage1(found.config, self.vision, start=False)
            fill(stage1, found.source, found.tensors, found.allowed)
            self._stage1 = stage1.to(self.device).eval()
        return self._stage1

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
            end=language.end,
            max_text=language.max_text,
            encoder_decoder=self.stage2.language_model.encoder_decoder,
        )

    @property
    def image_spec(self) -> ImageSpec:
        """Size, normalisation and resizing that the image encoder expects."""
        vision = self.vision
        return ImageSpec(vision.size, vision.mean, vision.std, self.config.vision.resize)

    def features(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Features [B, P, C] of the frozen image encoder."""
        return torch.cat(list(self._chunks(images)))

    def _chunks(self, images: ImageLike | Sequence[ImageLike]) -> Iterator[Tensor]:
        pictures = _listed(images)
        for start in range(0, len(pictures), self.batch):
            views = [plain_view(open_image(image), self.image_spec) for image in pictures[start : start + self.batch]]
            with torch.no_grad():
                yield self.vision(torch.stack(views).to(self.device))

    def text_ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [N, T] of captions for the Q-Former, cleaned where its training cleaned them."""
        ids, mask = self.text_tokenizer([clean_caption(text) for text in texts] if self.config.data.clean else texts)
        return ids.to(self.device), mask.to(self.device)


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    vision: str | None = None,
    language: str | None = None,
    quantize: str | None = None,
) -> Blip2:
    """Load a model for use.

    Args:
        source: run folder or weights file of ours, preset name (`tiny`, which comes with the package,
            `blip2-opt-2.7b`), Hugging Face folder or hub id, or LAVIS `.pth`.
        device: `auto` is CUDA where there is one.
        dtype: of the frozen towers (`fp32`, `bf16`, `fp16` or a torch dtype); None takes bf16
            where the hardware multiplies it fast, else fp32. The Q-Former stays in float32.
        device_map: passed to transformers for the language model (`auto` spreads it over devices,
            needs accelerate).
        vision, language: image encoder and language model in place of those that the checkpoint
            names.
        quantize: `int8` or `nf4` for the language model, `none` for neither; None takes what the
            run was trained with.

    Raises:
        CheckpointError: nothing there, incomplete, damaged, or its weights do not fit.
        ConfigError: a setting that cannot be used.
    """
    home = Path(located(source))
    found = open_checkpoint(source, vision=vision, language=language)
    if quantize is not None:
        settings = replace(found.config.language, quantize=None if quantize == "none" else quantize)
        found = replace(found, config=replace(found.config, language=settings))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model, report = assemble(found, device=name, dtype=torch_dtype(dtype), device_map=device_map)
    if isinstance(model, Stage1):
        return Blip2(found.config, stage1=model, home=home, report=report)
    return Blip2(found.config, stage2=model, home=home, report=report)


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its short name.

    Raises:
        ConfigError: unknown.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in known:
        raise ConfigError(f"dtype is {name!r}: it must be one of {', '.join(known)}")
    return known[name]


def open_image(image: ImageLike) -> Image.Image:
    """An RGB picture from a path, bytes, or a Pillow image.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return decode_image(buffer.getvalue())
    if isinstance(image, bytes):
        name, data = "image", image
    else:
        name = str(image)
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}") from error
    try:
        return decode_image(data)
    except BadSampleError as error:
        raise DataError(f"{name}: {error.reason}") from error


def _listed(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    if isinstance(images, str | Path | bytes | Image.Image):
        return [images]
    return list(images)


def _distinct(pictures: list[ImageLike]) -> tuple[list[ImageLike], list[int]]:
    """Pictures without repeats (by path, content or identity), and the place of each one given among them."""
    found: dict[str | bytes | int, ImageLike] = {}
    keys: list[str | bytes | int] = []
    for picture in pictures:
        own = id(picture) if isinstance(picture, Image.Image) else picture
        keys.append(str(own) if isinstance(own, Path) else own)
        found.setdefault(keys[-1], picture)
    places = {key: place for place, key in enumerate(found)}
    return list(found.values()), [places[key] for key in keys]
