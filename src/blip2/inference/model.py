"""A trained model at work: captions, answers, embeddings, matches.

    model = blip2.load("runs/s2")
    model.caption(["dog.jpg"])                      # ["a dog runs through the grass"]
    model.ask(["dog.jpg"], ["What animal is it?"])
    model.similarity(["dog.jpg"], ["a dog", "a cat"])   # [1, 2], needs a stage-1 run

Shape letters: B images, N texts, Q queries, T text tokens, P patches, C image-encoder channels,
E contrastive width, H language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2.configs import DecodingConfig
from blip2.data.film import SampleLike
from blip2.data.images import ImageLike, distinct, listed, open_image
from blip2.errors import ConfigError
from blip2.explain.attention import Attention, attend
from blip2.inference.few_shot import Examples, ShotLike
from blip2.inference.notebook import Card, Shown
from blip2.models.qformer.model import ImageKV
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import to_host, to_list
from blip2.weights.loaded import LoadedModel, rows_at_once

_QUESTIONS = 4  # questions about repeated images that go together, for each image that does


class Blip2(LoadedModel):
    """A loaded model; methods take one image or text, or a list, and work in batches.

    Stage-2 runs caption and answer; embeddings and matches come from the stage-1 run that they
    began from. A stage-1 run captions by itself, through its ITG head.

    See `blip2.weights.loaded.LoadedModel` for its attributes.
    """

    # -- text from images ---------------------------------------------------------------------

    def caption(
        self,
        images: ImageLike | Sequence[SampleLike],
        *,
        prompt: str | None = None,
        decoding: DecodingConfig | None = None,
        shots: Examples | Sequence[ShotLike] = (),
        **options: Any,
    ) -> list[Any]:
        """Captions of B images, films (`clip.mp4`, drawn as `frames` images) or lists of images that belong together.

        Args:
            prompt: text that the caption continues; None takes the run's.
            decoding: how to generate; single options (`beams=1, max_tokens=20`) may be given
                instead.
            shots: examples in front of every image, `{"image", "caption"}` each, or with `question` and
                `answer` (`blip2.inference.few_shot`); a model not trained on sequences may gain nothing by them.

        Returns:
            B strings; with `num` above 1, B lists of `num` strings.
        """
        config, examples = decoding or DecodingConfig(**options), self._examples(shots)
        if examples and config.rerank:
            raise ConfigError(f"rerank is {config.rerank}: it must be 0 with examples in front of the images")
        samples = listed(images)
        captions: list[list[str]] = [[] for _ in samples]
        for positions, features in self.sample_batches(samples):
            own = self.caption_features(features, prompt, config, examples)
            for position, texts in zip(positions, own, strict=True):
                captions[position] = texts
        return captions if config.num > 1 else [texts[0] for texts in captions]

    def answer(
        self,
        images: SampleLike,
        question: str,
        *,
        decoding: DecodingConfig | None = None,
        shots: Examples | Sequence[ShotLike] = (),
        **options: Any,
    ) -> str:
        """The answer to one question about one image, one film, or several images together, in their order.

            model.answer(["before.jpg", "after.jpg"], "What has changed?")
            model.answer("clip.mp4", "What happens?")

        See `ask` for the options.
        """
        return self.ask([images], question, decoding=decoding, shots=shots, **options)[0]

    def ask(
        self,
        images: ImageLike | Sequence[SampleLike],
        questions: str | Sequence[str],
        *,
        decoding: DecodingConfig | None = None,
        shots: Examples | Sequence[ShotLike] = (),
        **options: Any,
    ) -> list[str]:
        """Answers to one question per image (or one question about all).

        In place of an image, a film (`clip.mp4`, drawn as `frames` images) or a list of images that belong together.

        An image that comes several times is encoded once, and its soft prompts are read once for all
        its questions by a decoder-only language model.

        Decoding defaults to the paper's for VQA: beam 5, length penalty -1, 1 to 10 tokens.

        Args:
            shots: examples in front of every image, `{"image", "question", "answer"}` each, as in `caption`.
        """
        config, examples = decoding or DecodingConfig.for_answers(**options), self._examples(shots)
        images = listed(images)
        questions = _paired(questions, len(images), "questions")
        self._require_language_model()
        assert self.stage2 is not None
        if self.stage2.reads_instructions or examples:  # an image's soft prompts are not the same for all its questions
            unique, image_of = images, list(range(len(images)))
        else:
            unique, image_of = distinct(images)
        answers = [""] * len(questions)
        for positions, features_BPC in self.sample_batches(unique):
            own = [questions[image] for image in positions]  # of these images, where the Q-Former reads instructions
            soft_BQH = self.soft_prompts(features_BPC, own, prompts=[self._question_prompt(text) for text in own])
            place = {image: n for n, image in enumerate(positions)}
            rows = [n for n, image in enumerate(image_of) if image in place]
            for first in range(0, len(rows), _QUESTIONS * self.batch):
                part = rows[first : first + _QUESTIONS * self.batch]
                used = sorted({place[image_of[n]] for n in part})
                prompts = [self._question_prompt(questions[n]) for n in part]
                places = [used.index(place[image_of[n]]) for n in part]
                texts = self._generate(soft_BQH[used], prompts, config, places, examples)
                for n, (best, *_) in zip(part, texts, strict=True):
                    answers[n] = best
        return answers

    def ask_many(
        self,
        images: ImageLike | Sequence[SampleLike],
        questions: Sequence[str],
        *,
        decoding: DecodingConfig | None = None,
        **options: Any,
    ) -> list[list[str]]:
        """Answers to every question about every image: B lists, in the order of the questions; see `ask`."""
        images, questions = listed(images), list(questions)
        repeated = [image for image in images for _ in questions]
        answers = self.ask(repeated, questions * len(images), decoding=decoding, **options)
        return [answers[n * len(questions) : (n + 1) * len(questions)] for n in range(len(images))]

    def rank_answers(
        self,
        images: ImageLike | Sequence[SampleLike],
        questions: str | Sequence[str],
        candidates: Sequence[str],
    ) -> list[str]:
        """The candidate that the language model finds most likely as the answer to each question.

        Candidates are compared by the sum of their tokens' log-probabilities, end token included.
        """
        self._require_language_model()
        images = listed(images)
        questions = _paired(questions, len(images), "questions")
        best = [""] * len(images)
        for positions, features_BPC in self.sample_batches(images):
            part = [questions[image] for image in positions]
            prompts = [self._question_prompt(text) for text in part]
            soft_BQH = self.soft_prompts(features_BPC, part, prompts=prompts)
            scores = [self._log_likelihood(soft_BQH, prompts, [text] * len(prompts)) for text in candidates]
            for image, candidate in zip(positions, to_list(torch.stack(scores).argmax(dim=0)), strict=True):
                best[image] = candidates[candidate]
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
        return self._log_likelihood(
            self.soft_prompts(features_BPC, questions, prompts=prompts), list(prompts), list(texts)
        )

    @torch.no_grad()
    def _log_likelihood(self, soft_BQH: Tensor, prompts: list[str], texts: list[str]) -> Tensor:
        assert self.stage2 is not None
        tokenizer, model = self.language_tokenizer, self.stage2.language_model
        if model.encoder_decoder:
            parts = tuple(x.to(self.device) for x in tokenizer.pairs(prompts, texts))
            loss_M, labels_BT = model.encoder_decoder_loss(soft_BQH, *parts, reduction="none"), parts[3]
        else:
            parts = tuple(x.to(self.device) for x in tokenizer.targets(prompts, texts))
            loss_M, labels_BT = model.decoder_loss(soft_BQH, *parts, reduction="none"), parts[2]
        row_M = labels_BT.nonzero()[:, 0]
        return loss_M.new_zeros(len(prompts)).index_add(0, row_M, -loss_M)

    def caption_features(
        self,
        features_BPC: Tensor,
        prompt: str | Sequence[str] | None,
        config: DecodingConfig,
        examples: Examples | None = None,
    ) -> list[list[str]]:
        """Captions from image features: B lists of `config.num` strings; see `caption`.

        Args:
            prompt: of all images, or one per image; None takes the run's.
        """
        if features_BPC.ndim == 4 and (config.rerank or self.stage2 is None):
            raise ConfigError("several images or a film: captions of them need a stage 2 and no rerank")
        if config.rerank:
            wide = replace(config, rerank=0, num=config.rerank, beams=max(config.beams, config.rerank))
            captions = self.caption_features(features_BPC, prompt, wide)
            return [
                [text for _, text in sorted(zip(scores, texts, strict=True), key=lambda pair: -pair[0])][: config.num]
                for scores, texts in zip(self.itc_scores(features_BPC, captions), captions, strict=True)
            ]
        if self.stage2 is None:
            return [[text] for text in self._caption_with_qformer(features_BPC, config)]
        prompts = _paired(self.config.language.prompt if prompt is None else prompt, len(features_BPC), "prompts")
        return self._generate(self.soft_prompts(features_BPC, prompts=prompts), prompts, config, examples=examples)

    def itc_scores(self, features_BPC: Tensor, texts: list[list[str]]) -> list[list[float]]:
        """ITC similarity of each image with its own texts: B lists, as long as those of `texts`."""
        images_BQE = self.embed_features(features_BPC)
        texts_NE = self.embed_texts([text for own in texts for text in own]).split([len(own) for own in texts])
        return [
            to_list(query_text_similarity(image_QE[None], own_NE)[0])
            for image_QE, own_NE in zip(images_BQE, texts_NE, strict=True)
        ]

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
        self._require_language_model()
        return self._generate(self.soft_prompts(features_BPC, questions, prompts=prompts), prompts, config)

    @torch.no_grad()
    def _generate(
        self,
        soft_BQH: Tensor,
        prompts: list[str],
        config: DecodingConfig,
        image_of_prompt: list[int] | None = None,
        examples: Examples | None = None,
    ) -> list[list[str]]:
        """`config.num` texts after each prompt.

        Args:
            image_of_prompt: row of `soft_BQH` that a prompt is about; None where every row has its own.
        """
        assert self.stage2 is not None
        tokenizer = self.language_tokenizer
        ids_NT, mask_NT = (x.to(self.device) for x in tokenizer.prompts(prompts))
        self._require_room(soft_BQH.shape[1], ids_NT.shape[1], config)
        if examples and tokenizer.front:  # a sequence begins once, with the first example
            mask_NT = mask_NT & (mask_NT.cumsum(dim=1) > tokenizer.front)
        if image_of_prompt == list(range(len(soft_BQH))):
            image_of_prompt = None
        ids = self.stage2.language_model.generate(
            *(soft_BQH, ids_NT, mask_NT, config),
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
            images_B=None if image_of_prompt is None else torch.tensor(image_of_prompt, device=self.device),
            examples_1SH=examples.embeds if examples else None,
        )
        texts = [tokenizer.decode(row) for row in to_list(ids)]
        return [texts[n : n + config.num] for n in range(0, len(texts), config.num)]

    def _require_room(self, soft: int, text: int, config: DecodingConfig) -> None:
        """Refuse images that leave the language model no room for an answer."""
        assert self.stage2 is not None
        room, queries = self.stage2.language_model.room, self.config.qformer.queries
        if room is not None and soft > queries and soft + text + max(config.min_tokens, 1) > room:
            raise ConfigError(
                f"{soft // queries} images are {soft} tokens and the text {text}: the language model reads {room} in "
                "all: give fewer images, or draw fewer frames of a film"
            )

    def _caption_with_qformer(self, features_BPC: Tensor, config: DecodingConfig) -> list[str]:
        tokenizer, qformer = self.text_tokenizer, self.stage1.qformer
        size = rows_at_once(len(features_BPC), self.device, qformer.query_tokens.dtype)
        lengths = {"min_tokens": config.min_tokens, "max_tokens": config.max_tokens}
        rows: list[list[int]] = []
        with torch.no_grad():
            for part_BPC in features_BPC.split(size):
                kv = self.stage1.project_image(part_BPC)
                rows += qformer.generate(kv, dec_id=tokenizer.dec_id, end_id=tokenizer.sep_id, **lengths)
        return [tokenizer.decode(row) for row in rows]

    def _examples(self, shots: Examples | Sequence[ShotLike]) -> Examples | None:
        if isinstance(shots, Examples):
            return shots
        return Examples(self, shots) if shots else None

    def _question_prompt(self, question: str) -> str:
        return self.config.language.question.format(question.strip())

    def _require_language_model(self) -> None:
        if self.stage2 is None:
            raise ConfigError("this run is stage 1 and has no language model: questions need a stage-2 run")

    # -- embeddings and matches (stage 1) -------------------------------------------------------

    def embed_images(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Unit-norm query embeddings [B, Q, E] (32 x 256 at the paper's sizes), float32 on the CPU."""
        return torch.cat([self.embed_features(chunk) for chunk in self.batches(images)])

    def embed_features(self, features_BPC: Tensor) -> Tensor:
        """Query embeddings [B, Q, E] from image features."""
        with torch.no_grad():
            embedded, _ = self.stage1.embed_images(self.stage1.project_image(features_BPC))
        return to_host(embedded)

    def similarity(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Tensor:
        """ITC similarity [B, N] in [-1, 1]: the largest dot product over an image's queries."""
        return query_text_similarity(self.embed_images(images), self.embed_texts(texts))

    def match(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Tensor:
        """ITM probability [B] that text i describes image i (one text may stand for all)."""
        images = listed(images)
        texts = _paired(texts, len(images), "texts")
        parts = [
            self.match_features(self.image_kv(features_BPC), texts[n * self.batch : (n + 1) * self.batch])
            for n, features_BPC in enumerate(self.batches(images))
        ]
        return torch.cat(parts)

    def image_kv(self, features_BPC: Tensor) -> ImageKV:
        """An image's keys/values for many texts: project once, match often."""
        with torch.no_grad():
            return self.stage1.project_image(features_BPC)

    def match_logits(self, image_kv: ImageKV, texts: list[str]) -> Tensor:
        """ITM logits [N, 2], class 1 a match; text n is paired with image n mod B."""
        with torch.no_grad():
            return to_host(self.stage1.match_logits(*self.text_ids(texts), image_kv))

    def match_features(self, image_kv: ImageKV, texts: list[str]) -> Tensor:
        """ITM probabilities [N]; text n is paired with image n mod B."""
        return self.match_logits(image_kv, texts).softmax(dim=-1)[:, 1]

    # -- what it looks at, and how a notebook shows it -------------------------------------------

    def attend(self, image: ImageLike, text: str | None = None) -> Attention:
        """Where the model looks in one image, and with a text (needs stage 1) what its scores depend on."""
        features_1PC = self.features(image)
        caption = None if self.stage2 is None else self.caption_features(features_1PC, None, DecodingConfig())[0][0]
        return attend(self, features_1PC, text, caption)

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
        """What the model says of B images, as cards that a notebook shows and a terminal prints.

        Args:
            questions: asked about every image (needs stage 2).
            text: scored against every image, with maps of what the scores depend on (needs stage 1).
            maps: where the model looked; None shows them where there is a text.
            prompt: text that the captions continue; None takes the run's.
            options: of the captions' decoding (`num=3, beams=1`), see `DecodingConfig`.
        """
        images, questions = listed(images), [questions] if isinstance(questions, str) else list(questions)
        opened = [open_image(image) for image in images]
        captions = self.caption(opened, prompt=prompt, decoding=DecodingConfig(**options))
        answers = self.ask_many(opened, questions) if questions else [[] for _ in images]
        return Shown(
            [
                Card(
                    Path(image).name if isinstance(image, str | Path) else "image",
                    picture,
                    own if isinstance(own, list) else [own],
                    list(zip(questions, replies, strict=True)),
                    self.attend(picture, text) if maps or (maps is None and text is not None) else None,
                    self.image_spec.resize,
                )
                for image, picture, own, replies in zip(images, opened, captions, answers, strict=True)
            ]
        )


def _paired(texts: str | Sequence[str], count: int, name: str) -> list[str]:
    """One text per image; a single one stands for all."""
    paired = [texts] * count if isinstance(texts, str) else list(texts)
    if len(paired) != count:
        raise ConfigError(f"{len(paired)} {name} for {count} images: give one per image, or one in all")
    return paired
