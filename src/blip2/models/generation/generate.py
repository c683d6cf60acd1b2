"""Text after soft prompts: each prompt is read once, then widened to its beams or samples.

transformers' `generate` widens first, so that five beams pay five times for the image. The ids
written are the same.

Shape letters: I images, B rows, Q queries, T text tokens, S prompts and text together, L new tokens,
H width of the input embeddings, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2.models import hub
from blip2.models.generation.beam_search import Rules, search_beams, search_one
from blip2.models.generation.prefill import Continuation, is_supported, read, read_encoded, read_shared


@dataclass(frozen=True)
class Options:
    """How text is written; `LanguageModel.generate` says what each means."""

    ends: tuple[int, ...]
    pad_id: int
    beams: int
    num: int
    min_tokens: int
    max_tokens: int
    length_penalty: float
    sample: bool
    top_p: float
    temperature: float
    repetition_penalty: float


@dataclass(frozen=True)
class Prompts:
    """Soft prompts of images, and the text that follows them.

    Args:
        soft: [I, Q, H], in the dtype of the embeddings.
        text, mask: [B, T, H] and [B, T], embedded text, padded on either side.
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


def generate(model: Any, prompts: Prompts, options: Options, *, encoder_decoder: bool) -> Tensor:
    """New token ids [B * num, L] of a language model of transformers.

    Models that transformers' `generate` treats in a way of their own, or whose cache cannot be
    widened (recurrent layers), go through it.
    """
    start = _start_id(model) if encoder_decoder else None
    found = _prefill(model, prompts, start) if is_supported(model) else None
    if found is None:
        return _by_transformers(model, *prompts.joined(left=not encoder_decoder), options)[:, int(encoder_decoder) :]
    rules = Rules(
        start=() if start is None else (start,),
        ends=options.ends,
        pad_id=options.pad_id,
        limit=options.max_tokens,
        process=_processors(options, starts=int(encoder_decoder), device=prompts.mask.device),
    )
    if options.sample or options.beams == 1:
        return search_one(found, options.num, rules, sample=options.sample)
    return search_beams(found, options.beams, options.num, rules, length_penalty=options.length_penalty)


def _prefill(model: Any, prompts: Prompts, start: int | None) -> Continuation | None:
    if start is not None:  # an encoder sees image and text at once: what it read cannot be shared
        return read_encoded(model, *prompts.joined(left=False), start)
    if prompts.shared:
        assert prompts.image is not None
        text_BTH, mask_BT = _moved(prompts.text, prompts.mask, left=True)
        found = read_shared(model, prompts.soft, text_BTH, mask_BT, prompts.image)
        if found is not None:
            return found
    return read(model, *prompts.joined(left=True))


def _processors(options: Options, *, starts: int, device: torch.device) -> Any:
    """transformers' own processors of scores, in its order."""
    from transformers import generation as hf

    found = hf.LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        found.append(hf.RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.min_tokens > 0:
        ends = torch.tensor(options.ends, device=device)
        found.append(hf.MinNewTokensLengthLogitsProcessor(starts, options.min_tokens, ends, device=str(device)))
    if options.sample and options.temperature != 1.0:
        found.append(hf.TemperatureLogitsWarper(float(options.temperature)))
    if options.sample and options.top_p < 1.0:
        found.append(hf.TopPLogitsWarper(options.top_p))
    return found


def _by_transformers(model: Any, embeds_BSH: Tensor, mask_BS: Tensor, options: Options) -> Tensor:
    """The same by transformers' `generate`, start token included."""
    chosen: dict[str, Any] = {"do_sample": False, "num_beams": options.beams}
    if options.sample:
        chosen = {"do_sample": True, "num_beams": 1, "top_p": options.top_p, "top_k": 0}
        chosen["temperature"] = float(options.temperature)
    elif options.beams > 1:
        chosen["length_penalty"] = options.length_penalty
    with hub.quiet():
        out: Tensor = model.generate(
            inputs_embeds=embeds_BSH,
            attention_mask=mask_BS,
            eos_token_id=list(options.ends),
            pad_token_id=options.pad_id,
            num_return_sequences=options.num,
            min_new_tokens=options.min_tokens,
            max_new_tokens=options.max_tokens,
            repetition_penalty=float(options.repetition_penalty),
            **chosen,
        )
    return out


def _start_id(model: Any) -> int:
    """Start token of a decoder behind an encoder."""
    own = model.generation_config.decoder_start_token_id
    return int(model.config.decoder_start_token_id if own is None else own)


def _moved(embeds_BSH: Tensor, mask_BS: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """Decoders continue at the right end, so their padding moves to the left; encoders are trained the other way."""
    order_BS = torch.argsort(mask_BS, dim=1, stable=True, descending=not left)
    return embeds_BSH.gather(1, order_BS[..., None].expand_as(embeds_BSH)), mask_BS.gather(1, order_BS)
