"""A language model that has read its prompts once and continues them token by token.

transformers concatenates its cache again for every token and copies all of it when beams are
reordered. Rows that continue the same prompt share it here, so only their new tokens are moved.

Shape letters: B prompts (rows read), N rows that continue them, I images, Q queries (soft prompts),
T text tokens, S tokens read, H width of the input embeddings, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

# Settings of a model's own generation config that change the text, unless they have a neutral value.
_TOKENS = ("bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_SETTINGS = (
    *("encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_p", "top_h"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values", "early_stopping"),
    *("exponential_decay_length_penalty", "sequence_bias", "guidance_scale", "watermarking_config", "stop_strings"),
    *("diversity_penalty", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers"),
)


def is_supported(model: Any) -> bool:
    """Whether `Continuation` does all that transformers' `generate` would do for this model."""
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
        """Expand the B rows read to N rows that continue them, with room for so many new tokens."""
        for number, part in enumerate(_parts(self.past)):
            own = room if number == 0 else 0  # an encoder's output does not grow
            for n, layer in enumerate(part.layers):
                if type(layer) is DynamicLayer:
                    part.layers[n] = WideLayer(layer, index_N, own)
                else:
                    layer.batch_select_indices(index_N.to(layer.keys.device))
        self._select_rest(index_N)

    def select(self, index_N: Tensor) -> None:
        """Keep only these rows, in this order, repeats allowed; logits excepted."""
        for part in _parts(self.past):
            for layer in part.layers:
                layer.batch_select_indices(index_N.to(layer.keys.device))
        self._select_rest(index_N)

    def reorder(self, index_N: Tensor) -> None:
        """Reorder the rows, each within the rows of its own prompt."""
        for layer in _parts(self.past)[0].layers:
            layer.reorder_cache(index_N)

    def step(self, tokens_N: Tensor) -> Tensor:
        """Append one token to every row; returns the logits [N, V] of the next one, float32."""
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

    def _select_rest(self, index_N: Tensor) -> None:
        self.length = self.length[index_N]
        if self.mask is not None:
            self.mask = self.mask[index_N]
        if self.encoder is not None:
            self.encoder = self.encoder[index_N]


def read(model: Any, embeds_BTH: Tensor, mask_BS: Tensor, past: Any = None) -> Continuation | None:
    """Read prompts that end at the right edge, with a decoder-only model.

    Args:
        embeds_BTH: the last T of the S tokens of `mask_BS`; those before them are in `past`.

    Returns:
        None where the model keeps what it read in a form that cannot be widened.
    """
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
    past = getattr(out, "past_key_values", None)
    if not can_widen(past):
        return None
    logits_BV = _last_logits(out, mask_BS.device)
    return Continuation(model, logits_BV, past, mask_BS if padded else None, mask_BS.sum(dim=1))


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
    continuation = read(model, prompt_IQH, mask_BT.new_ones(images, queries))
    if continuation is None or not is_plain(continuation.past):
        return None
    continuation.select(image_B)
    mask_BS = torch.cat([mask_BT.new_ones(len(mask_BT), queries), mask_BT], dim=1)
    return read(model, text_BTH, mask_BS, continuation.past)


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
    if not can_widen(past):
        return None
    return Continuation(
        model, _last_logits(out, mask_BS.device), past, mask_BS, torch.ones_like(start_B1[:, 0]), encoder_BSH
    )


def _last_logits(out: Any, device: torch.device) -> Tensor:
    logits_NV: Tensor = out.logits[:, -1].to(device=device, dtype=torch.float32)
    return logits_NV


def _encoded(encoder_NSH: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=encoder_NSH)


def _accepts(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


class WideLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of N rows that continue the B rows read; new tokens are written in place.

    Args:
        layer: of B rows.
        index_N: the row read that each row continues.
        room: most new tokens that will follow.
    """

    def __init__(self, layer: Any, index_N: Tensor, room: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.read = self.length = layer.keys.shape[-2]
        self.buffers = [_with_room(x, index_N.to(x.device), room) for x in (layer.keys, layer.values)]
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all keys and values so far."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.length] = new
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows within their prompt: only the new tokens are moved."""
        if self.length > self.read:
            for buffer in self.buffers:
                new = buffer[:, :, self.read : self.length]
                new.copy_(new.index_select(0, beam_idx.to(buffer.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.buffers = [buffer.index_select(0, indices.to(buffer.device)) for buffer in self.buffers]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def can_widen(cache: Any) -> bool:
    """Whether a cache consists of layers that can be widened; recurrent and quantized ones cannot."""
    return all(
        isinstance(part, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in part.layers)
        for part in _parts(cache)
    )


def is_plain(cache: Any) -> bool:
    """Whether every layer sees all that was read: no sliding windows."""
    return all(type(layer) is DynamicLayer for part in _parts(cache) for layer in part.layers)


def _parts(cache: Any) -> list[Any]:
    """The decoder's own part, and that of the encoder's output where there is one."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


def _with_room(x_BhSd: Tensor, index_N: Tensor, room: int) -> Tensor:
    _, heads, read, width = x_BhSd.shape
    buffer = x_BhSd.new_empty(len(index_N), heads, read + room, width)
    buffer[:, :, :read] = x_BhSd[index_N]
    return buffer
