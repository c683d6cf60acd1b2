"""A language model that has read its prompts once, and goes on from them token by token.

Shape letters: B prompts (rows read), N rows that go on, I images, Q queries (soft prompts),
T text tokens, S tokens read, H width of the input embeddings, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2.models.generation import kv_cache

# Settings of a model's own generation config that change what is written, unless they have a neutral value.
_TOKENS = ("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_SETTINGS = (
    *("encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values", "early_stopping"),
    *("exponential_decay_length_penalty", "sequence_bias", "guidance_scale", "watermarking_config", "stop_strings"),
    *("diversity_penalty", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers"),
)


def is_supported(model: Any) -> bool:
    """Whether transformers' `generate` does nothing for this model beyond what `Continuation` does."""
    from transformers import GenerationMixin

    settings = model.generation_config
    plain = all(getattr(settings, name, None) is None for name in _TOKENS)
    plain &= all(getattr(settings, name, None) in (None, False, 0, 1) for name in _SETTINGS)
    own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    return plain and not own and not hasattr(model, "_reorder_cache")


@dataclass
class Continuation:
    """What a model has read, and the logits of the token that follows each row.

    Args:
        model: transformers `...ForCausalLM` or `...ForConditionalGeneration`.
        logits: [N, V], float32.
        past: its cache.
        mask: [N, S], 1 on real tokens, of the encoder where there is one; None where nothing is padded.
        length: [N], real tokens so far.
        encoder: [N, S, H], output of the encoder, where there is one.
    """

    model: Any
    logits: Tensor
    past: Any
    mask: Tensor | None
    length: Tensor
    encoder: Tensor | None = None

    def widen(self, index_N: Tensor, room: int) -> None:
        """Let N rows go on from the B rows read, with room for so many new tokens."""
        kv_cache.widen(self.past, index_N, room)
        self._take(index_N)

    def select(self, index_N: Tensor) -> None:
        """Keep only these rows, in this order; logits excepted."""
        kv_cache.select(self.past, index_N)
        self._take(index_N)

    def reorder(self, index_N: Tensor) -> None:
        """Rows change places with rows that go on from the same prompt."""
        kv_cache.reorder(self.past, index_N)

    def step(self, tokens_N: Tensor) -> Tensor:
        """Append one token to every row; returns the logits [N, V] of the next, in float32."""
        options: dict[str, Any] = {"past_key_values": self.past, "use_cache": True, "return_dict": True}
        if self.encoder is not None:
            options |= {"encoder_outputs": _encoded(self.encoder), "attention_mask": self.mask}
            out = self.model(decoder_input_ids=tokens_N[:, None], **options)
        else:
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
                options["attention_mask"] = self.mask
            if _accepts(self.model, "position_ids"):
                options["position_ids"] = self.length[:, None]
            out = self.model(input_ids=tokens_N[:, None], **options)
        self.length = self.length + 1
        return _last_logits(out, tokens_N.device)

    def _take(self, index_N: Tensor) -> None:
        self.length = self.length[index_N]
        if self.mask is not None:
            self.mask = self.mask[index_N]
        if self.encoder is not None:
            self.encoder = self.encoder[index_N]


def read(model: Any, embeds_BSH: Tensor, mask_BS: Tensor) -> Continuation | None:
    """Read prompts that end at the right edge, with a decoder-only model.

    Returns:
        None where the model keeps what it read in a form that cannot be widened.
    """
    return _read(model, embeds_BSH, mask_BS, None)


def read_shared(
    model: Any, prompt_IQH: Tensor, text_BTH: Tensor, mask_BT: Tensor, image_B: Tensor
) -> Continuation | None:
    """Read soft prompts once per image, then the texts about them, with a decoder-only model.

    Args:
        text_BTH, mask_BT: texts that end at the right edge, at least one token each.
        image_B: the image that each text is about.

    Returns:
        None where the model keeps what it read in a form that cannot be shared: sliding windows
        count the padding between image and text.
    """
    images, queries = prompt_IQH.shape[:2]
    found = _read(model, prompt_IQH, torch.ones(images, queries, dtype=torch.int64, device=mask_BT.device), None)
    if found is None or not kv_cache.is_plain(found.past):
        return None
    found.select(image_B)
    whole_BS = torch.cat([torch.ones(len(mask_BT), queries, dtype=torch.int64, device=mask_BT.device), mask_BT], dim=1)
    return _read(model, text_BTH, whole_BS, found.past)


def read_encoded(model: Any, embeds_BSH: Tensor, mask_BS: Tensor, start_id: int) -> Continuation | None:
    """Read prompts that start at the left edge, with an encoder-decoder model, and the start token."""
    encoder_BSH = model.get_encoder()(
        inputs_embeds=embeds_BSH, attention_mask=mask_BS, return_dict=True
    ).last_hidden_state
    start_B1 = torch.full((len(embeds_BSH), 1), start_id, device=mask_BS.device)
    out = model(
        encoder_outputs=_encoded(encoder_BSH),
        attention_mask=mask_BS,
        decoder_input_ids=start_B1,
        use_cache=True,
        return_dict=True,
    )
    past = out.past_key_values
    if not kv_cache.is_supported(past):
        return None
    return Continuation(
        model, _last_logits(out, mask_BS.device), past, mask_BS, torch.ones_like(start_B1[:, 0]), encoder_BSH
    )


def _read(model: Any, embeds_BTH: Tensor, mask_BS: Tensor, past: Any) -> Continuation | None:
    """Read T tokens behind the S - T in `past`."""
    padded = not bool(mask_BS.all())
    options: dict[str, Any] = {"past_key_values": past} if past is not None else {}
    if _accepts(model, "position_ids"):
        place_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        options["position_ids"] = place_BS[:, -embeds_BTH.shape[1] :]
    if _accepts(model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    out = model(
        inputs_embeds=embeds_BTH,
        attention_mask=mask_BS if padded else None,
        use_cache=True,
        return_dict=True,
        **options,
    )
    now = getattr(out, "past_key_values", None)
    if not kv_cache.is_supported(now):
        return None
    return Continuation(
        model,
        _last_logits(out, mask_BS.device),
        now,
        mask_BS if padded else None,
        mask_BS.sum(dim=1),
    )


def _last_logits(out: Any, device: torch.device) -> Tensor:
    logits_NV: Tensor = out.logits[:, -1].to(device=device, dtype=torch.float32)
    return logits_NV


def _encoded(encoder_NSH: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=encoder_NSH)


def _accepts(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
