"""What the worker thread does with a batch, by kind; nothing else touches the model.

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
from blip2.inference import Blip2
from blip2.models.qformer.model import QFormer
from blip2.ops.devices import to_list
from blip2.search.query import Hit, Index
from blip2.server.errors import RequestError, bad, broken_index, other_index

_log = logging.getLogger("blip2.serve")


@dataclass(frozen=True)
class Write:
    """Kind: text about images. Requests of equal settings go together.

    Args:
        asks: questions and answers (else captions); a Q-Former that reads questions is given them.
        scored: ITM probabilities and ITC similarities of the texts are wanted.
        seed: of the sampling; a seeded request goes alone.
    """

    decoding: DecodingConfig
    asks: bool = False
    scored: bool = False
    seed: int | None = None
    alone: int = 0


@dataclass(frozen=True)
class Prompt:
    """Item of `Write`: a view [3, S, S] and the texts that go with it.

    Args:
        turns: earlier questions with their answers; the oldest are left out where the language model
            has no room for all.
        text: the question, or what the caption continues; None takes the model's prompt.
    """

    view: Tensor
    text: str | None = None
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Written:
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
class Kind:
    """Another kind of work: `texts` and `images` are embedded in batches, `search` and `attend` go alone."""

    name: str
    alone: int = 0


@dataclass(frozen=True)
class Query:
    """Item of `search` and `attend`; `image` are the bytes of a checked picture."""

    text: str | None
    image: bytes | None
    k: int = 20
    rerank: int = 0
    within: str = "images"


class Worker:
    """A model, perhaps with an index, and what can be asked of them.

    Args:
        index: opened with the same model.
    """

    def __init__(self, model: Blip2, index: Index | None = None) -> None:
        self.model, self.index = model, index
        self._trouble = ""  # what was last wrong with the index on the disk
        try:
            self.matches = model.stage1 is not None
        except Blip2Error:
            self.matches = False
        self.judges = self.matches and model.has_itm
        self.asks = model.stage2 is not None
        self.attends = isinstance((model.stage2 or model.stage1).qformer, QFormer)

    def __call__(self, kind: Any, items: Sequence[Any]) -> Sequence[Any]:
        """One result per item."""
        try:
            if isinstance(kind, Write):
                return self.write(kind, items)
            work: dict[str, Callable[[Any], Sequence[Any]]] = {
                "texts": self.embed_texts,
                "images": self.embed_images,
                "search": self.search,
                "attend": self.attend,
            }
            return work[kind.name](items)
        except ConfigError as error:  # what this model cannot do, or a setting out of bounds
            raise bad(str(error)) from error

    # -- text ---------------------------------------------------------------------------------

    def write(self, kind: Write, items: Sequence[Prompt]) -> list[Written]:
        """Captions or answers."""
        if kind.asks and not self.asks:
            raise bad("this model is stage 1 and has no language model: it captions, but answers no questions")
        features_BPC = self._features([item.view for item in items], apart=True)
        fitted = [self._fit(item, kind) for item in items]
        decoding = self._bounded(kind.decoding, [tokens for _, tokens in fitted])
        prompts = [prompt for prompt, _ in fitted]
        questions = [item.text or "" for item in items] if kind.asks else None
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=kind.seed is not None):
            if kind.seed is not None:
                torch.manual_seed(kind.seed)
            if self.asks:
                found = self.model.generate(features_BPC, prompts, decoding, questions=questions)
            else:
                found = self.model.caption_features(features_BPC, None, decoding)
        scores = self._scores(features_BPC, found) if kind.scored and self.judges else None
        itc_scores = self.model.itc_scores(features_BPC, found) if kind.scored and self.matches else None
        return [
            Written(
                texts,
                scores[n] if scores else None,
                itc_scores[n] if itc_scores else None,
                fitted[n][1] + self._queries,
                [self.count(t) for t in texts],
            )
            for n, texts in enumerate(found)
        ]

    def count(self, text: str) -> int:
        """Tokens of a text that the model wrote."""
        if not self.asks:
            return int(self.model.text_tokenizer([text])[1].sum()) - 2  # [CLS] and [SEP]
        return self._length(text) - self._front

    def _fit(self, item: Prompt, kind: Write) -> tuple[str, int]:
        """The whole prompt of an item, with as many turns as there is room for, and its tokens.

        Raises:
            RequestError: 400, the question alone is too long.
        """
        if not self.asks:
            return "", 0
        language = self.model.config.language
        if not kind.asks:
            text = language.prompt if item.text is None else item.text
        else:
            text = language.question.format((item.text or "").strip())
        turns = list(item.turns) if kind.asks else []
        room = self._room - max(kind.decoding.min_tokens, 1)
        while True:
            whole = " ".join([*(f"{language.question.format(q)} {_sentence(a)}" for q, a in turns), text])
            length = self._length(whole)
            if length <= room:
                return whole, length
            if not turns:
                raise bad(
                    f"the text has {length} tokens: this model has room for {room}", code="context_length_exceeded"
                )
            turns = turns[1:]

    def _bounded(self, decoding: DecodingConfig, lengths: list[int]) -> DecodingConfig:
        """No more new tokens than the language model has room for behind the longest prompt."""
        if not self.asks:
            return decoding
        room = max(self._room - max(lengths), decoding.min_tokens, 1)
        return replace(decoding, max_tokens=min(decoding.max_tokens, room))

    def _scores(self, features_BPC: Tensor, found: list[list[str]]) -> list[list[float]]:
        """ITM probabilities [B][num] that each text describes its image."""
        kv = self.model.image_kv(features_BPC)
        columns = [to_list(self.model.match_features(kv, list(texts))) for texts in zip(*found, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def _length(self, text: str) -> int:
        return int(self.model.language_tokenizer.prompts([text])[1].sum())

    @cached_property
    def _front(self) -> int:
        return self._length("")

    @cached_property
    def _queries(self) -> int:
        stage = self.model.stage2 or self.model.stage1
        return int(stage.qformer.num_queries)

    @cached_property
    def _room(self) -> int:
        """Tokens of prompt and answer that fit behind the soft prompts."""
        assert self.model.stage2 is not None
        language = self.model.stage2.language_model
        longest = getattr(language.model.config, "max_position_embeddings", None)
        if language.encoder_decoder or longest is None:
            longest = 1024  # relative positions: no bound of its own, but memory
        return min(int(longest), 4096) - self._queries

    # -- vectors, search, maps -------------------------------------------------------------------

    def embed_texts(self, items: Sequence[list[str]]) -> list[tuple[Tensor, int]]:
        """Per request, embeddings [N, E] and the tokens that were read."""
        everything = [text for texts in items for text in texts]
        found = self.model.embed_texts(everything).split([len(texts) for texts in items])
        counts = [int(self.model.text_tokenizer(texts)[1].sum()) for texts in items]
        return list(zip(found, counts, strict=True))

    def embed_images(self, items: Sequence[list[Tensor]]) -> list[Tensor]:
        """Per request, query embeddings [N, Q, E]."""
        views = [view for views in items for view in views]
        size = self.model.batch
        parts = [self.model.embed_features(self._features(views[n : n + size])) for n in range(0, len(views), size)]
        return list(torch.cat(parts).split([len(views) for views in items]))

    def search(self, items: Sequence[Query]) -> list[list[Hit]]:
        """Hits in the index, with what was added to it since the server began.

        Each search looks at the files anew: what is put back is searched again, and a mapped file that was cut is
        not read, for which the system would end the process.

        Raises:
            RequestError: 503, the index is another model's by now, damaged or gone.
        """
        if self.index is None:
            raise RequestError(404, "this server has no index: start it with --index INDEX", code="no_index")
        try:
            found = self._search(self.index, items)
        except (DataError, RunError):  # a writer may have replaced files meanwhile
            try:
                found = self._search(self.index, items)
            except (DataError, RunError) as error:
                raise self._refused(error, broken_index()) from error
        self._trouble = ""
        return found

    def _search(self, index: Index, items: Sequence[Query]) -> list[list[Hit]]:
        try:
            index.refresh()
        except ConfigError as error:
            raise self._refused(error, other_index()) from error
        return [index.search(q.text, q.image, k=q.k, rerank=q.rerank, within=q.within) for q in items]

    def _refused(self, error: Blip2Error, answer: RequestError) -> RequestError:
        """The answer to whoever searches; the log is told once what it is about."""
        if str(error) != self._trouble:
            _log.error("searches are refused: %s", error)
        self._trouble = str(error)
        return answer

    def attend(self, items: Sequence[Query]) -> list[dict[str, Any]]:
        """Attention maps over the patches, as lists of rows; see `Blip2.attend`."""
        return [self._maps(query) for query in items]

    def _maps(self, query: Query) -> dict[str, Any]:
        assert query.image is not None
        if not self.attends:
            raise bad("this model has no Q-Former whose attention could be shown")
        found = self.model.attend(query.image, query.text)
        maps: dict[str, Any] = {
            "grid": list(found.grid),
            "resize": self.model.image_spec.resize,
            "layers": found.layers,
            "queries": to_list(found.heatmap(found.queries), 6),
            "winner": found.winner,
            "caption": found.caption,
            "itm": found.itm,
            "itc": None if found.itc is None else to_list(found.itc, 6),
            "itm_map": None if found.itm_maps is None else to_list(found.heatmap(found.itm_maps.sum(0)), 6),
            "itc_map": None if found.itc_maps is None else to_list(found.heatmap(found.itc_maps.sum(0)), 6),
            "words": found.words,
            "word_maps": None if found.word_maps is None else to_list(found.heatmap(found.word_maps), 6),
        }
        return maps

    def _features(self, views: list[Tensor], *, apart: bool = False) -> Tensor:
        return self.model.encode(views, apart=apart)


def _sentence(answer: str) -> str:
    answer = answer.strip()
    return answer if answer.endswith((".", "!", "?")) else f"{answer}."
