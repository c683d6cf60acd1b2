"""A trained bridge at work: captions, answers, embeddings, matches.

    model = blip2.load("runs/s2")
    model.caption(["dog.jpg"])                      # ["a dog runs through the grass"]
    model.ask(["dog.jpg"], ["What animal is it?"])
    model.similarity(["dog.jpg"], ["a dog", "a cat"])   # [1, 2], needs a stage-1 run

Shape letters: B images, N texts, Q queries, T text tokens, P patches, C image-encoder channels,
E contrastive width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blip2.configs import DecodingConfig
from blip2.data.image_inputs import ImageLike, distinct, listed
from blip2.errors import ConfigError
from blip2.inference.loaded import Loaded
from blip2.models.qformer.model import ImageKV
from blip2.ops.contrastive import query_text_similarity
from blip2.ops.devices import to_host, to_list

if TYPE_CHECKING:
    from blip2.explain.attention import Attention
    from blip2.inference.few_shot import Examples, ShotLike
    from blip2.inference.notebook import Shown

_QUESTIONS = 4  # questions about repeated images that go together, for each image that does


class Blip2(Loaded):
    """A loaded model; methods take one image or text, or a list, and work in batches.

    Stage-2 runs caption and answer; embeddings and matches come from the stage-1 run that they
    began from. A stage-1 run captions by itself, through its ITG head.

    See `blip2.inference.loaded.Loaded` for its attributes.
    """

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
                `answer` (`blip2.inference.few_shot`); a model not trained on sequences may gain nothing by them.

        Returns:
            B strings; with `num` above 1, B lists of `num` strings.
        """
        config = decoding or DecodingConfig(**options)
        if shots:
            if config.rerank:
                raise ConfigError(f"rerank is {config.rerank}: it must be 0 with examples in front of the images")
            text, examples = self.config.language.prompt if prompt is None else prompt, self._examples(shots)
            parts = (examples.generate(chunk, [text] * len(chunk), config) for chunk in self._for_text(images))
        else:
            parts = (self.caption_features(chunk, prompt, config) for chunk in self._for_text(images))
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
        config = decoding or DecodingConfig.for_answers(**options)
        pictures = listed(images)
        asked = [questions] * len(pictures) if isinstance(questions, str) else list(questions)
        if len(asked) != len(pictures):
            raise ConfigError(f"{len(asked)} questions for {len(pictures)} images: give one per image, or one in all")
        once, places = distinct(pictures)
        # a Q-Former that reads questions has soft prompts of their own for each
        alone = self.stage2 is not None and not self.stage2.reads_questions and not shots
        if alone and len(once) < len(pictures):
            return self._ask_repeatedly(once, places, asked, config)
        prompts = [self.config.language.question.format(q.strip()) for q in asked]
        write = self._examples(shots).generate if shots else self.generate
        answers: list[str] = []
        for start, features in zip(range(0, len(pictures), self.batch), self._for_text(pictures), strict=True):
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
        pictures, asked = listed(images), list(questions)
        repeated = [picture for picture in pictures for _ in asked]
        answers = self.ask(repeated, asked * len(pictures), decoding=decoding, **options)
        return [answers[n * len(asked) : (n + 1) * len(asked)] for n in range(len(pictures))]

    def _examples(self, shots: Examples | Sequence[ShotLike]) -> Examples:
        from blip2.inference.few_shot import Examples

        return shots if isinstance(shots, Examples) else Examples(self, shots)

    def _ask_repeatedly(
        self, once: list[ImageLike], places: list[int], questions: list[str], config: DecodingConfig
    ) -> list[str]:
        """Answers to questions of which number n is about image `places[n]`."""
        assert self.stage2 is not None
        tokenizer, answers = self.language_tokenizer, [""] * len(questions)
        for start, features in zip(range(0, len(once), self.batch), self._for_text(once), strict=True):
            with torch.no_grad():
                soft = self.stage2.soft_prompts(features)
            about = [n for n, place in enumerate(places) if start <= place < start + self.batch]
            for first in range(0, len(about), _QUESTIONS * self.batch):
                rows = about[first : first + _QUESTIONS * self.batch]
                used = sorted({places[n] - start for n in rows})
                prompts = [self.config.language.question.format(questions[n].strip()) for n in rows]
                ids, mask = (x.to(self.device) for x in tokenizer.prompts(prompts))
                out = self.stage2.language_model.generate(
                    soft[used],
                    ids,
                    mask,
                    config,
                    end_id=tokenizer.end_id,
                    pad_id=tokenizer.pad_id,
                    images_B=torch.tensor([used.index(places[n] - start) for n in rows], device=self.device),
                )
                for n, ids in zip(rows, to_list(out[:: config.num]), strict=True):
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
        pictures = listed(images)
        asked = [questions] * len(pictures) if isinstance(questions, str) else list(questions)
        best: list[str] = []
        for start, features in zip(range(0, len(pictures), self.batch), self._for_text(pictures), strict=True):
            prompts = [self.config.language.question.format(q.strip()) for q in asked[start : start + self.batch]]
            with torch.no_grad():
                soft = self.soft_prompts(features, asked[start : start + self.batch])
                likely = torch.stack([self._likelihood(soft, prompts, [c] * len(prompts)) for c in candidates])
            best += [candidates[n] for n in to_list(likely.argmax(dim=0))]
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
        if config.rerank:
            wide = replace(config, rerank=0, num=config.rerank, beams=max(config.beams, config.rerank))
            found = self.caption_features(features_BPC, prompt, wide)
            return [texts[: config.num] for texts in self._by_similarity(features_BPC, found)]
        if self.stage2 is None:
            return [[text] for text in self._caption_with_qformer(features_BPC, config)]
        prompt = self.config.language.prompt if prompt is None else prompt
        return self.generate(features_BPC, [prompt] * len(features_BPC), config)

    def itc_scores(self, features_BPC: Tensor, found: list[list[str]]) -> list[list[float]]:
        """ITC similarity of each image with its own texts: B lists, as long as those of `found`."""
        images_BQE = self.embed_features(features_BPC)
        texts_NE = self.embed_texts([text for texts in found for text in texts]).split([len(t) for t in found])
        own = (
            query_text_similarity(image_QE[None], text_NE)[0]
            for image_QE, text_NE in zip(images_BQE, texts_NE, strict=True)
        )
        return [to_list(scores_N) for scores_N in own]

    def _by_similarity(self, features_BPC: Tensor, found: list[list[str]]) -> list[list[str]]:
        """Each image's texts, the most similar to it by ITC first."""
        scores = self.itc_scores(features_BPC, found)
        order = [sorted(range(len(one)), key=one.__getitem__, reverse=True) for one in scores]
        return [[texts[n] for n in places] for texts, places in zip(found, order, strict=True)]

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
            out = self.stage2.language_model.generate(
                soft, ids, mask, config, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id
            )
        texts = [tokenizer.decode(row) for row in to_list(out)]
        return [texts[n : n + config.num] for n in range(0, len(texts), config.num)]

    def _caption_with_qformer(self, features_BPC: Tensor, config: DecodingConfig) -> list[str]:
        tokenizer = self.text_tokenizer
        with torch.no_grad():
            kv = self.stage1.project_image(features_BPC)
            rows = self.stage1.qformer.generate(
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
        given = [texts] if isinstance(texts, str) else list(texts)
        size = 8 * self.batch
        with torch.no_grad():
            parts = [self.stage1.embed_texts(*self.text_ids(given[n : n + size])) for n in range(0, len(given), size)]
        return to_host(torch.cat(parts))

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
        pictures = listed(images)
        paired = [texts] * len(pictures) if isinstance(texts, str) else list(texts)
        if len(paired) != len(pictures):
            raise ConfigError(f"{len(paired)} texts for {len(pictures)} images: give one per image, or one in all")
        found = []
        for start, features in zip(range(0, len(pictures), self.batch), self._chunks(pictures), strict=True):
            found.append(self.match_features(self.image_kv(features), paired[start : start + self.batch]))
        return torch.cat(found)

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

    def attend(self, image: ImageLike, text: str | None = None) -> Attention:
        """Where the model looks in one image, and with a text (needs stage 1) what its scores depend on."""
        from blip2.explain.attention import attend

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
        from blip2.inference.notebook import show

        return show(self, images, questions, text=text, maps=maps, prompt=prompt, **options)
