"""Attention weights of a Q-Former and of a language model, computed again on request.

The models' own passes use fused attention, which keeps no weights. `recording` gives a second Q-Former
that shares every parameter and computes softmax(q k) openly in its cross-attention; nothing of the
first is touched, so that other threads may use it meanwhile.

Shape letters: Q queries, P tokens of the image encoder, T text tokens, D Q-Former width, L
cross-attention layers, W words (tokens) of a caption, H language-model width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blip2.models.language.model import LanguageModel
from blip2.models.qformer.layers import QFormerLayer
from blip2.models.qformer.model import QFormer
from blip2.ops.devices import to_host, widened


@dataclass
class Recorded:
    """Cross-attention of one pass over one image.

    Args:
        weights: per layer [heads, Q, P], rows sum to one.
        probes: zeros added to the weights, by whose gradient a score's gradient by the weights is had.
    """

    weights: list[Tensor] = field(default_factory=list)
    probes: list[Tensor] = field(default_factory=list)

    def maps(self) -> Tensor:
        """[L, Q, P], mean over the heads; sums to one over P."""
        return to_host(torch.stack([weights.mean(dim=0) for weights in self.weights]))

    def relevance(self, score: Tensor) -> Tensor:
        """[L, P]: attention x its positive gradient, summed over queries, mean over heads.

        The gradient-weighted maps of ALBEF (arXiv 2107.07651, section 4), kept per layer. Attention that does
        not raise the score counts as zero.
        """
        gradients = torch.autograd.grad(score, self.probes, allow_unused=True)
        rows = []
        for weights, gradient in zip(self.weights, gradients, strict=True):
            gain = torch.zeros_like(weights) if gradient is None else weights * gradient[0].clamp(min=0)
            rows.append(gain.mean(dim=0).sum(dim=0))
        return to_host(torch.stack(rows))


def recording(qformer: QFormer) -> tuple[QFormer, Recorded]:
    """A Q-Former that shares the parameters of another and records its cross-attention; for one image."""
    recorded = Recorded()
    shadow, layers = _shallow(qformer), []
    for layer in qformer.layers:
        assert isinstance(layer, QFormerLayer)
        twin = _shallow(layer)
        if layer.cross_attention is not None:
            cross = _shallow(layer.cross_attention)
            object.__setattr__(cross, "attend", _open_attention(recorded))
            twin._modules["cross_attention"] = cross
        layers.append(twin)
    listed = nn.ModuleList()
    listed._modules.update({str(n): twin for n, twin in enumerate(layers)})
    shadow._modules["layers"] = listed
    return shadow, recorded


def _shallow(module: Any) -> Any:
    """A module with the same parameters and parts, whose parts may be exchanged."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def _open_attention(recorded: Recorded) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = widened(scores).softmax(dim=-1)
        probe = torch.zeros_like(weights, requires_grad=torch.is_grad_enabled())
        recorded.weights.append(weights.detach()[0])
        recorded.probes.append(probe)
        return ((weights + probe).to(v.dtype) @ v).transpose(1, 2).flatten(2)

    return attend


@torch.no_grad()
def prompt_attention(
    model: LanguageModel, prompt_1QH: Tensor, ids_1T: Tensor, mask_1T: Tensor, written_1W: Tensor | None = None
) -> Tensor:
    """How much of its attention each token of a text gives to the soft prompts, for one image.

    The model runs once with open attention, which is not for several threads at a time.

    Args:
        ids_1T, mask_1T: right-padded text after the soft prompts; an encoder-decoder's encoder reads it.
        written_1W: tokens that the decoder of an encoder-decoder writes; the start token is put in front here.

    Returns:
        Mean over layers and heads; rows sum to at most one, the rest goes to the text. Decoder-only [Q + T, Q], a row
        for the position that reads a token: the one that writes it is the row before. Encoder-decoder [W, Q], a row
        for the position that writes a token: cross-attention to the soft prompts' places, where the encoder has mixed
        them with each other and the text.

    Raises:
        ValueError: the model does not give its attention.
    """
    embeds, mask = model._join(prompt_1QH, ids_1T, mask_1T)
    inputs, kind, config = {"inputs_embeds": embeds, "attention_mask": mask}, "attentions", model.model.config
    if written_1W is not None:
        start = torch.full_like(written_1W[:, :1], config.decoder_start_token_id)
        inputs["decoder_input_ids"], kind = torch.cat([start, written_1W[:, :-1]], dim=1), "cross_attentions"
    before = config._attn_implementation
    model.model.set_attn_implementation("eager")
    try:
        out = model.model(**inputs, use_cache=False, output_attentions=True)
    finally:
        model.model.set_attn_implementation(before)
    layers = getattr(out, kind, None)
    if not layers:
        raise ValueError(f"{config.model_type} does not give its attention")
    mean = torch.stack([weights[0].float().mean(dim=0) for weights in layers]).mean(dim=0)
    return to_host(mean[:, : prompt_1QH.shape[1]])
