"""What the worker thread does with a batch; nothing else touches the model.

Shape letters: B images, N texts, Q queries, E contrastive width, S side in pixels, P image tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blip2.configs import DecodingConfig
from blip2.errors import Blip2Error, ConfigError, DataError, RunError
from blip2.explain.attention import Attention
from blip2.inference import Blip2
from blip2.models.qformer.model import QFormer
from blip2.ops.devices import to_list
from blip2.search.query import Hit, Index
from blip2.server.errors import RequestError, bad
from blip2.server.schemas import Decoding, SearchRequest

_log = logging.getLogger("blip2.serve")


@dataclass(frozen=True)
class Generation:
    """Task: text about images. Requests of equal settings go together.

    Args:
        answers: questions and answers (else captions); a Q-Former that reads questions is given them.
        scored: with ITM probabilities and ITC similarities of the texts.
        images: of each request.
        seed: of the sampling.
        alone: `object()`, which equals no other, where it shares no batch: a seeded one.
    """

    decoding: DecodingConfig
    answers: bool = False
    scored: bool = False
    images: int = 1
    seed: int | None = None
    alone: object = None

    @classmethod
    def of(
        cls,
        request: Decoding,
        limit: int,
        *,
        answers: bool = False,
        scored: bool = False,
        num: int = 1,
        images: int = 1,
    ) -> Generation:
        """The paper's decoding where a request does not say otherwise, and at most `limit` new tokens."""
        paper = DecodingConfig.for_answers() if answers else DecodingConfig()
        max_tokens = min(request.max_tokens or paper.max_tokens, limit)
        min_tokens = paper.min_tokens if request.min_tokens is None else request.min_tokens
        decoding = DecodingConfig(
            beams=max(request.beams, num),
            num=num,
            min_tokens=min(min_tokens, max_tokens),
            max_tokens=max_tokens,
            length_penalty=paper.length_penalty if request.length_penalty is None else request.length_penalty,
            repetition_penalty=request.repetition_penalty,
            sample=request.sample,
            top_p=request.top_p,
            temperature=request.temperature,
        )
        seed = request.seed if request.sample else None
        return cls(decoding, answers, scored, images, seed, None if seed is None else object())


@dataclass(frozen=True)
class Prompt:
    """Item of `Generation`: a view [3, S, S], or [I, 3, S, S] of several images, and the texts that go with it.

    Args:
        text: the question, or what the caption continues; None takes the model's prompt.
        turns: earlier questions with their answers; the oldest are left out where the language model
            has no room for all.
    """

    view: Tensor
    text: str | None = None
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Generated:
    """Texts, best first, with counts of tokens (soft prompts among those of the prompt).

    Args:
        scores: ITM probabilities, None where the model never learned ITM.
        itc_scores: ITC similarities, None where there is no stage 1.
    """

    texts: list[str]
    scores: list[float] | None
    itc_scores: list[float] | None
    prompt_tokens: int
    tokens: list[int]


@dataclass(frozen=True)
class Task:
    """Any other work of a `Worker`, which maps items to results.

    Args:
        alone: `object()`, which equals no other, where it shares no batch.
    """

    work: Callable[[Sequence[Any]], Sequence[Any]]
    alone: object = None


class Worker:
    """A model, perhaps with an index, and what can be asked of them.

    Args:
        index: opened with the same model.
    """

    def __init__(self, model: Blip2, index: Index | None = None) -> None:
        self.model, self.index = model, index
        self._logged = ""  # what was last wrong with the index on the disk
        try:
            self.matches = model.stage1 is not None
        except Blip2Error:
            self.matches = False
        self.judges = self.matches and model.has_itm
        self.asks = model.stage2 is not None
        qformer = (model.stage2 or model.stage1).qformer
        self.attends, self.queries = isinstance(qformer, QFormer), int(qformer.num_queries)

    def __call__(self, task: Any, items: Sequence[Any]) -> Sequence[Any]:
        """One result per item."""
        try:
            return self.generate(task, items) if isinstance(task, Generation) else task.work(items)
        except ConfigError as error:  # what this model cannot do, or a setting out of bounds
            raise bad(str(error)) from error

    # -- text ---------------------------------------------------------------------------------

    def generate(self, task: Generation, items: Sequence[Prompt]) -> list[Generated]:
        """Captions or answers."""
        if task.answers and not self.asks:
            raise bad("this model is stage 1 and has no language model: it captions, but answers no questions")
        features_BPC = self._features(task, items)
        soft = self.queries if task.images == 1 else self.model.soft_length(task.images)
        fitted = [self._fit(item, task) if self.asks else ("", 0) for item in items]
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=task.seed is not None):
            if task.seed is not None:
                torch.manual_seed(task.seed)
            if self.asks:
                # No more new tokens than the language model has room for behind the longest prompt.
                room = self._room - (soft - self.queries)
                room = max(room - max(tokens for _, tokens in fitted), task.decoding.min_tokens, 1)
                decoding = replace(task.decoding, max_tokens=min(task.decoding.max_tokens, room))
                questions = [item.text or "" for item in items] if task.answers else None
                texts = self.model.generate(features_BPC, [p for p, _ in fitted], decoding, questions=questions)
            else:
                texts = self.model.caption_features(features_BPC, None, task.decoding)
        nothing: list[None] = [None] * len(items)
        scores = self._itm_scores(features_BPC, texts) if task.scored and self.judges else nothing
        itc_scores = self.model.itc_scores(features_BPC, texts) if task.scored and self.matches else nothing
        return [
            Generated(*parts, tokens + soft, [self._count(text) for text in parts[0]])
            for parts, (_, tokens) in zip(zip(texts, scores, itc_scores, strict=True), fitted, strict=True)
        ]

    def _features(self, task: Generation, items: Sequence[Prompt]) -> Tensor:
        """Features [B, P, C], or [B, I, P, C] of I images each, as many images at a time as the model takes."""
        if task.images == 1:
            return self.model.encode([item.view for item in items], apart=True)
        if not self.asks:
            raise bad("this model is stage 1 and has no language model: it captions one image at a time")
        views, size = [view for item in items for view in item.view], self.model.batch
        parts = [self.model.encode(views[n : n + size], apart=True) for n in range(0, len(views), size)]
        return torch.cat(parts).unflatten(0, (-1, task.images))

    def _count(self, text: str) -> int:
        """Tokens of a text that the model wrote."""
        if not self.asks:
            return int(self.model.text_tokenizer([text])[1].sum()) - 2  # [CLS] and [SEP]
        return self._length(text) - self._empty_length

    def _fit(self, item: Prompt, task: Generation) -> tuple[str, int]:
        """The prompt of an item, with as many turns as there is room for, and its tokens.

        Raises:
            RequestError: 400, the question alone is too long.
        """
        language = self.model.config.language
        if task.answers:
            text = language.question.format((item.text or "").strip())
            turns = [f"{language.question.format(question)} {_sentence(answer)}" for question, answer in item.turns]
        else:
            text, turns = language.prompt if item.text is None else item.text, []
        soft = self.queries if task.images == 1 else self.model.soft_length(task.images)
        room = self._room - (soft - self.queries) - max(task.decoding.min_tokens, 1)
        if room < 1:
            raise bad(
                f"{task.images} images are {soft} tokens: this model reads {self._room + self.queries} in all",
                code="context_length_exceeded",
            )
        for start in range(len(turns) + 1):
            prompt = " ".join([*turns[start:], text])
            length = self._length(prompt)
            if length <= room:
                return prompt, length
        raise bad(f"the text has {length} tokens: this model has room for {room}", code="context_length_exceeded")

    def _itm_scores(self, features_BPC: Tensor, texts: list[list[str]]) -> list[list[float]]:
        """ITM probabilities [B][num] that each text describes its image."""
        kv = self.model.image_kv(features_BPC)
        columns = [to_list(self.model.match_features(kv, list(column))) for column in zip(*texts, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def _length(self, text: str) -> int:
        return int(self.model.language_tokenizer.prompts([text])[1].sum())

    @cached_property
    def _empty_length(self) -> int:
        return self._length("")

    @cached_property
    def _room(self) -> int:
        """Tokens of prompt and answer that fit behind the soft prompts."""
        assert self.model.stage2 is not None
        longest = self.model.stage2.language_model.room or 1024  # without a bound of its own: for its memory
        return min(longest, 4096) - self.queries

    # -- vectors, search, maps -------------------------------------------------------------------

    def embed_texts(self, items: Sequence[list[str]]) -> list[tuple[Tensor, int]]:
        """Per request, embeddings [N, E] and the tokens that were read."""
        vectors = self.model.embed_texts([text for texts in items for text in texts])
        counts = [int(self.model.text_tokenizer(texts)[1].sum()) for texts in items]
        return list(zip(vectors.split([len(texts) for texts in items]), counts, strict=True))

    def embed_images(self, items: Sequence[list[Tensor]]) -> list[Tensor]:
        """Per request, query embeddings [N, Q, E]."""
        views, size = [view for views in items for view in views], self.model.batch
        parts = [self.model.embed_features(self.model.encode(views[n : n + size])) for n in range(0, len(views), size)]
        return list(torch.cat(parts).split([len(views) for views in items]))

    def search(self, items: Sequence[tuple[SearchRequest, bytes | None]]) -> list[list[Hit]]:
        """Hits in the index, with what was added to it since the server began; an item is a request and its image.

        Each search looks at the files anew: what is put back is searched again, and a mapped file that was cut is
        not read, for which the system would end the process.

        Raises:
            RequestError: 503, the index is another model's by now, damaged or gone.
        """
        try:
            hits = self._search(items)
        except (DataError, RunError):  # a writer may have replaced files meanwhile
            try:
                hits = self._search(items)
            except (DataError, RunError) as error:
                raise self._refused(
                    error,
                    "index_damaged",
                    "the index of this server is gone, or one of its files was damaged or replaced: put it back, or "
                    "build it again with `blip2 index build` (the server's log names the file)",
                ) from error
        self._logged = ""
        return hits

    def _search(self, items: Sequence[tuple[SearchRequest, bytes | None]]) -> list[list[Hit]]:
        assert self.index is not None
        try:
            self.index.refresh()
        except ConfigError as error:
            raise self._refused(
                error,
                "index_of_another_model",
                "the index of this server was built anew with another model: start the server again with that model, "
                "or put the old index back (the server's log names both models)",
            ) from error
        return [
            self.index.search(request.text, image, k=request.k, rerank=request.rerank, within=request.within)
            for request, image in items
        ]

    def _refused(self, error: Blip2Error, code: str, message: str) -> RequestError:
        """The answer to whoever searches, 503; each cause is logged once."""
        if str(error) != self._logged:
            _log.error("searches are refused: %s", error)
        self._logged = str(error)
        return RequestError(503, message, code=code)

    def attend(self, items: Sequence[tuple[str | None, bytes]]) -> list[dict[str, Any]]:
        """Attention maps over the patches, as lists of rows, for texts and images; see `Blip2.attend`."""
        if not self.attends:
            raise bad("this model has no Q-Former whose attention could be shown")
        return [self._maps(self.model.attend(image, text)) for text, image in items]

    def _maps(self, attention: Attention) -> dict[str, Any]:
        def heatmap(maps: Tensor | None) -> Any:
            return None if maps is None else to_list(attention.heatmap(maps), 6)

        itm_maps, itc_maps = attention.itm_maps, attention.itc_maps
        return {
            "grid": list(attention.grid),
            "resize": self.model.image_spec.resize,
            "layers": attention.layers,
            "queries": heatmap(attention.queries),
            "winner": attention.winner,
            "caption": attention.caption,
            "itm": attention.itm,
            "itc": None if attention.itc is None else to_list(attention.itc, 6),
            "itm_map": heatmap(None if itm_maps is None else itm_maps.sum(0)),
            "itc_map": heatmap(None if itc_maps is None else itc_maps.sum(0)),
            "words": attention.words,
            "word_maps": heatmap(attention.word_maps),
        }


def _sentence(answer: str) -> str:
    answer = answer.strip()
    return answer if answer.endswith((".", "!", "?")) else f"{answer}."
