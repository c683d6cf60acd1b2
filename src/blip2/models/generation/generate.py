"""Text after soft prompts: greedy search, nucleus sampling and beam search, with the ids of transformers' `generate`.

Each prompt is read once and then widened to its beams or samples, where transformers widens first: five beams
pay five times for the image there. Rows that are done leave the batch.

Shape letters: I images, B prompts, N rows of the model, A prompts not yet done, Q queries, T text tokens, S soft
prompts and text together, K beams, C candidates, L tokens written (a decoder's start token included), H width of the
input embeddings, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2.configs import DecodingConfig
from blip2.models import towers
from blip2.models.generation.prefill import Continuation, is_supported, read, read_encoded, read_shared

_NEVER = -1.0e9  # the score of what may not be chosen, as in transformers
_CACHED = 250_000  # float32 numbers that a core's second-level cache holds twice: 1 MB and 2


@dataclass(frozen=True)
class Prompts:
    """Soft prompts of images, and the text that follows them.

    Args:
        soft: [I, Q, H], in the dtype of the embeddings.
        text, mask: [B, T, H] and [B, T], embedded text and its int64 mask, padded on either side.
        image: [B], the image of each text; None where every text has its own, in order.
    """

    soft: Tensor
    text: Tensor
    mask: Tensor
    image: Tensor | None

    def joined(self, *, left: bool) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, H] and mask of image and text side by side, the padding moved to the left or right."""
        soft_BQH = self.soft if self.image is None else self.soft[self.image]
        mask_BS = torch.cat([self.mask.new_ones(soft_BQH.shape[:2]), self.mask], dim=1)
        return _moved(torch.cat([soft_BQH, self.text], dim=1), mask_BS, left=left)

    @property
    def shared(self) -> bool:
        """Whether several texts are about one image, each of at least a token."""
        several = self.image is not None and len(self.image) > len(self.soft)
        return several and self.mask.shape[1] > 0 and bool(self.mask.any(dim=1).all())


def generate(model: Any, prompts: Prompts, decoding: DecodingConfig, *, ends: tuple[int, ...], pad_id: int) -> Tensor:
    """New token ids [B * num, at most `max_tokens`] of a language model of transformers.

    Models that transformers' `generate` treats in a way of their own, or whose cache cannot be
    widened (recurrent layers), go through it.

    Args:
        ends: ids that end a row.
        pad_id: fills the rest of a row.
    """
    start = _start_ids(model)
    continuation = _prefill(model, prompts, start) if is_supported(model) else None
    if continuation is None:
        embeds_BSH, mask_BS = prompts.joined(left=not start)
        return _by_transformers(model, embeds_BSH, mask_BS, decoding, ends, pad_id)[:, len(start) :]
    process = _processors(decoding, ends, starts=len(start), device=prompts.mask.device)
    rules = Rules(decoding, start, ends, pad_id, process)
    if decoding.sample or decoding.beams == 1:
        return search_one(continuation, rules)
    return search_beams(continuation, rules)


def _prefill(model: Any, prompts: Prompts, start: tuple[int, ...]) -> Continuation | None:
    if start:  # an encoder sees image and text at once: what it read cannot be shared
        return read_encoded(model, *prompts.joined(left=False), start[0])
    if prompts.shared:
        assert prompts.image is not None
        text_BTH, mask_BT = _moved(prompts.text, prompts.mask, left=True)
        continuation = read_shared(model, prompts.soft, text_BTH, mask_BT, prompts.image)
        if continuation is not None:
            return continuation
    return read(model, *prompts.joined(left=True))


def _start_ids(model: Any) -> tuple[int, ...]:
    """The start token of a decoder behind an encoder; empty for a decoder-only model."""
    if not model.config.is_encoder_decoder:
        return ()
    own = model.generation_config.decoder_start_token_id
    return (int(model.config.decoder_start_token_id if own is None else own),)


def _moved(embeds_BSH: Tensor, mask_BS: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """Decoders continue at the right end, so their padding moves to the left; encoders are trained the other way."""
    order_BS = torch.argsort(mask_BS, dim=1, stable=True, descending=not left)
    return embeds_BSH.gather(1, order_BS[..., None].expand_as(embeds_BSH)), mask_BS.gather(1, order_BS)


def _processors(decoding: DecodingConfig, ends: tuple[int, ...], *, starts: int, device: torch.device) -> Any:
    """transformers' own processors of scores, in its order."""
    from transformers import generation as hf

    out = hf.LogitsProcessorList()
    if decoding.repetition_penalty != 1.0:
        out.append(hf.RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.min_tokens > 0:
        end_ids = torch.tensor(ends, device=device)

        def refuse_end(ids_NL: Tensor, scores_NV: Tensor) -> Tensor:
            """As `MinNewTokensLengthLogitsProcessor`, in place: a copy of all scores takes as long as five layers."""
            if ids_NL.shape[1] - starts < decoding.min_tokens:
                scores_NV[:, end_ids] = -torch.inf
            return scores_NV

        out.append(refuse_end)
    if decoding.sample and decoding.temperature != 1.0:
        out.append(hf.TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.sample and decoding.top_p < 1.0:
        out.append(hf.TopPLogitsWarper(decoding.top_p))
    return out


def _by_transformers(
    model: Any, embeds_BSH: Tensor, mask_BS: Tensor, decoding: DecodingConfig, ends: tuple[int, ...], pad_id: int
) -> Tensor:
    """The same by transformers' `generate`, start token included."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": decoding.beams}
    if decoding.sample:
        options = {"do_sample": True, "num_beams": 1, "top_p": decoding.top_p, "top_k": 0}
        options["temperature"] = float(decoding.temperature)
    elif decoding.beams > 1:
        options["length_penalty"] = decoding.length_penalty
    with towers.quiet():
        out: Tensor = model.generate(
            inputs_embeds=embeds_BSH,
            attention_mask=mask_BS,
            eos_token_id=list(ends),
            pad_token_id=pad_id,
            num_return_sequences=decoding.num,
            min_new_tokens=decoding.min_tokens,
            max_new_tokens=decoding.max_tokens,
            repetition_penalty=float(decoding.repetition_penalty),
            **options,
        )
    return out


@dataclass(frozen=True)
class Rules:
    """How tokens are chosen, and when a row ends.

    Args:
        start: ids that stand before the first new token: none, or a decoder's start token.
        ends: ids that end a row.
        pad_id: fills the rest of a row.
        process: scores [N, V] of the next token, given ids [N, L] and scores, which it may change.
    """

    decoding: DecodingConfig
    start: tuple[int, ...]
    ends: tuple[int, ...]
    pad_id: int
    process: Callable[[Tensor, Tensor], Tensor]

    def blank(self, shape: tuple[int, ...], fill: int, device: torch.device) -> Tensor:
        """Ids [*shape, L] with the start tokens in place."""
        ids = torch.full((*shape, len(self.start) + self.decoding.max_tokens), fill, dtype=torch.int64, device=device)
        ids[..., : len(self.start)] = torch.tensor(self.start, dtype=torch.int64, device=device)
        return ids

    def ending(self, tokens: Tensor) -> Tensor:
        """Which of the tokens end a row."""
        return torch.isin(tokens, torch.tensor(self.ends, device=tokens.device))


def search_one(model: Continuation, rules: Rules) -> Tensor:
    """New token ids [B * num, longest of them] by greedy search, or of `num` samples per prompt.

    Samples are those of transformers from the same seed: every row draws at every step, done or not.
    """
    device = model.logits.device
    start = torch.arange(len(model.logits), device=device).repeat_interleave(rules.decoding.num)
    logits_NV = model.logits[start]
    model.widen(start, rules.decoding.max_tokens)
    ids_NL = rules.blank((len(start),), rules.pad_id, device)
    rows = torch.arange(len(start), device=device)  # unfinished
    first = len(rules.start)
    for length in range(first, ids_NL.shape[1]):
        scores_NV = rules.process(ids_NL[rows, :length], logits_NV)
        tokens_N = _draw(scores_NV, rows, len(ids_NL)) if rules.decoding.sample else scores_NV.argmax(dim=-1)
        ids_NL[rows, length] = tokens_N
        unfinished = (~rules.ending(tokens_N)).nonzero().squeeze(1)
        if not len(unfinished) or length + 1 == ids_NL.shape[1]:
            break
        if len(unfinished) < len(rows):
            rows, tokens_N = rows[unfinished], tokens_N[unfinished]
            model.select(unfinished)
        logits_NV = model.step(tokens_N)
    return ids_NL[:, first : length + 1]


def search_beams(model: Continuation, rules: Rules) -> Tensor:
    """New token ids [B * num, longest of them] by beam search, the best of a prompt first.

    A prompt ends once no running beam can beat its worst finished one. Running beams are compared at
    their present length (`early_stopping=False` in transformers).
    """
    device, B = model.logits.device, len(model.logits)
    beams, length_penalty = rules.decoding.beams, rules.decoding.length_penalty
    # transformers fills with the end token where the padding's id is 0
    fill = rules.pad_id or rules.ends[0]
    ids_BKL = rules.blank((B, beams), fill, device)
    lengths_BK = torch.zeros(B, beams, dtype=torch.int64, device=device)
    rows = torch.arange(B, device=device)  # unfinished
    state = _Beams.start(ids_BKL, rules)
    # the first step has one row per prompt, since its beams are all equal
    scores_BV = rules.process(state.ids[:, 0, : state.length], model.logits.log_softmax(dim=-1))
    scores_AKV = scores_BV[:, None].expand(-1, beams, -1)
    model.widen(rows.repeat_interleave(beams), rules.decoding.max_tokens)
    while True:
        parents_AK = state.advance(scores_AKV, rules, length_penalty)
        can_improve = state.can_improve(length_penalty)
        if state.length == ids_BKL.shape[2]:
            can_improve = torch.zeros_like(can_improve)
        done, unfinished = (~can_improve).nonzero().squeeze(1), can_improve.nonzero().squeeze(1)
        if len(done):
            ids_BKL[rows[done]], lengths_BK[rows[done]] = state.done_ids[done], state.done_lengths[done]
        if not len(unfinished):
            break
        parent_rows_AK = parents_AK + beams * torch.arange(len(parents_AK), device=device)[:, None]
        if len(done):
            rows = rows[unfinished]
            state.select(unfinished)
            model.select(parent_rows_AK[unfinished].flatten())
        else:
            model.reorder(parent_rows_AK.flatten())
        logits_NV = model.step(state.ids[..., state.length - 1].flatten())
        scores_NV = rules.process(state.ids[..., : state.length].flatten(0, 1), _log_softmax(logits_NV))
        scores_AKV = scores_NV.view(-1, beams, scores_NV.shape[-1])
    num = rules.decoding.num
    return ids_BKL[:, :num, len(rules.start) :].flatten(0, 1)[:, : int(lengths_BK[:, :num].max())]


@dataclass
class _Beams:
    """Running and finished beams of the prompts not yet done.

    Args:
        ids, scores: [A, K, L] and [A, K], running beams, best first, and the sums of their
            log-probabilities.
        done_ids, done_scores, done_lengths, done: finished beams, best first; slots not yet taken
            score `_NEVER`.
        length: tokens of a running beam, start tokens included.
        first: start tokens.
    """

    ids: Tensor
    scores: Tensor
    done_ids: Tensor
    done_scores: Tensor
    done_lengths: Tensor
    done: Tensor
    length: int
    first: int

    @classmethod
    def start(cls, blank_BKL: Tensor, rules: Rules) -> _Beams:
        """All beams start equal, so only the first may be continued in the first step."""
        never_BK = torch.full(blank_BKL.shape[:2], _NEVER, device=blank_BKL.device)
        scores_BK = never_BK.clone()
        scores_BK[:, 0] = 0.0
        none_BK = torch.zeros_like(never_BK, dtype=torch.bool)
        first = len(rules.start)
        return cls(blank_BKL.clone(), scores_BK, blank_BKL.clone(), never_BK, none_BK.long(), none_BK, first, first)

    def advance(self, scores_AKV: Tensor, rules: Rules, length_penalty: float) -> Tensor:
        """Add a token to every beam and keep the best; returns the beam [A, K] that each running one continues."""
        K, V = scores_AKV.shape[1:]
        # enough that K go on even where every beam may end in each of the end tokens
        count = min(max(2, 1 + len(rules.ends)) * K, V)
        # the best of every beam, then of all: its own score changes no order within a beam
        own_AKC, tokens_AKC = scores_AKV.topk(count)
        best_AC, index_AC = (own_AKC + self.scores[:, :, None]).flatten(1).topk(count)
        parents_AC, tokens_AC = index_AC // count, tokens_AKC.flatten(1).gather(1, index_AC)
        ids_ACL = _gather(self.ids, parents_AC)
        ids_ACL[..., self.length] = tokens_AC
        self.length += 1
        ended_AC = rules.ending(tokens_AC)
        if self.length == ids_ACL.shape[2]:
            ended_AC = torch.ones_like(ended_AC)
        self._finish(ids_ACL, best_AC, ended_AC, length_penalty)
        running_AC = best_AC + ended_AC.float() * _NEVER
        chosen_AK = running_AC.topk(K).indices
        self.ids, self.scores = _gather(ids_ACL, chosen_AK), _gather(running_AC, chosen_AK)
        return _gather(parents_AC, chosen_AK)

    def _finish(self, ids_ACL: Tensor, best_AC: Tensor, ended_AC: Tensor, length_penalty: float) -> None:
        """Those of the K best continuations that have ended join the finished beams, of which the best K stay."""
        K, new = self.done.shape[1], self.length - self.first
        ended_AC = ended_AC & (torch.arange(ended_AC.shape[1], device=ended_AC.device) < K)
        score_AC = best_AC / new**length_penalty + ~ended_AC * _NEVER
        scores = torch.cat([self.done_scores, score_AC], dim=1)
        chosen_AK = scores.topk(K).indices
        lengths = torch.cat([self.done_lengths, torch.full_like(ended_AC, new, dtype=torch.int64)], dim=1)
        self.done_ids = _gather(torch.cat([self.done_ids, ids_ACL], dim=1), chosen_AK)
        self.done_scores, self.done_lengths = _gather(scores, chosen_AK), _gather(lengths, chosen_AK)
        self.done = _gather(torch.cat([self.done, ended_AC], dim=1), chosen_AK)

    def can_improve(self, length_penalty: float) -> Tensor:
        """Prompts [A] whose best running beam would, ended now, beat their worst finished one."""
        best_A1 = self.scores[:, :1] / (self.length - self.first) ** length_penalty
        worst_AK = torch.where(self.done, self.done_scores.amin(dim=1, keepdim=True), _NEVER)
        return (best_A1 > worst_AK).any(dim=1)

    def select(self, index: Tensor) -> None:
        """Keep only these prompts."""
        for name in ("ids", "scores", "done_ids", "done_scores", "done_lengths", "done"):
            setattr(self, name, getattr(self, name)[index])


def _log_softmax(logits_NV: Tensor) -> Tensor:
    """Log-probabilities in place of the logits; a few rows at a time where they then stay in a processor's cache."""
    rows = max(1, _CACHED // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else len(logits_NV)
    for some_NV in logits_NV.split(rows):
        some_NV.copy_(some_NV.log_softmax(dim=-1))
    return logits_NV


def _gather(x: Tensor, index_AK: Tensor) -> Tensor:
    """Entries of the second axis of [A, C, ...]."""
    return torch.take_along_dim(x, index_AK[..., None] if x.ndim == 3 else index_AK, dim=1)


def _draw(scores_NV: Tensor, rows: Tensor, total: int) -> Tensor:
    """One token per row, as if all `total` rows drew: a row draws the same whichever other rows are done."""
    probs_NV = scores_NV.softmax(dim=-1)
    if len(rows) < total:
        all_NV = probs_NV.new_zeros(total, probs_NV.shape[1])
        all_NV[:, 0] = 1.0
        all_NV[rows] = probs_NV
        probs_NV = all_NV
    drawn_N = torch.multinomial(probs_NV, num_samples=1).squeeze(1)
    return drawn_N[rows]
