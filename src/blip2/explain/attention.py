"""Where a model looks: attention maps of the queries, and what its scores with a text depend on.

    attention = model.attend("dog.jpg", "a dog in the grass")
    attention.queries       # [L, Q, P] attention of every query, per cross-attention layer; sums to one
    attention.itc           # [Q] cosine of each query with the text: the largest is the image's
    attention.itm_maps      # [L, P] gradient-weighted: what made the pair a match
    attention.heatmap(attention.itm_maps.sum(0))     # [h, w] over the image

Shape letters: Q queries, P tokens of the image encoder, L cross-attention layers, W words (tokens) of
the caption, C image-encoder channels, E contrastive width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from blip2.errors import ConfigError
from blip2.explain.attention_maps import prompt_attention, recording
from blip2.io.figures import overlay, png
from blip2.models.qformer.model import QFormer
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.ops.devices import to_host, to_list, to_numpy
from blip2.weights.loaded import LoadedModel


@dataclass
class PatchMaps:
    """Maps over the tokens of an image encoder.

    Args:
        grid: rows and columns of patches.
        prefix: image tokens in front of the patches ([CLS], registers), part of P.
    """

    grid: tuple[int, int]
    prefix: int

    def heatmap(self, map_P: Tensor) -> Tensor:
        """[h, w]: the patches of a map over image tokens; what fell on the tokens before them is left out."""
        return map_P[..., self.prefix :].unflatten(-1, self.grid)

    def overlay(self, view: Image.Image, map_P: Tensor, share: float = 0.6) -> str:
        """A map over the view of the encoder as an inline PNG; `share` as in `io.figures.overlay`."""
        return png(overlay(view, to_numpy(self.heatmap(map_P)), share=share))


@dataclass
class Attention(PatchMaps):
    """What `Blip2.attend` returns; tensors are float32 on the CPU.

    Args:
        grid: rows and columns of patches.
        prefix: image tokens in front of the patches ([CLS], registers), part of P.
        layers: numbers of the Q-Former's layers that have cross-attention.
        queries: [L, Q, P] the queries' attention to the image, mean over heads; sums to one over P.
            With a text it is that of the stage-1 Q-Former, else of the model's own.
        text: as given; the fields below are None without it.
        itc: [Q] cosines of the queries with the text.
        itc_maps: [L, P] what the largest of them depends on, gradient-weighted.
        itm: probability that text and image belong together; this, `itm_maps` and `pair_queries` are None where
            the model never learned ITM.
        itm_maps: [L, P] what the class-1 logit depends on, gradient-weighted.
        pair_queries: [L, Q, P] the queries' attention while they see the text.
        caption: of a stage-2 model; the fields below are None where there is none.
        words: the W tokens of the caption.
        word_prompts: [W, Q] attention of the position that writes each token to the soft prompts.
        word_maps: [W, P] that attention, carried on to the image through the queries' last layer.
    """

    layers: list[int]
    queries: Tensor
    text: str | None = None
    itc: Tensor | None = None
    itc_maps: Tensor | None = None
    itm: float | None = None
    itm_maps: Tensor | None = None
    pair_queries: Tensor | None = None
    caption: str | None = None
    words: list[str] | None = None
    word_prompts: Tensor | None = None
    word_maps: Tensor | None = None

    @property
    def winner(self) -> int | None:
        """The query whose cosine with the text is the image's score."""
        return None if self.itc is None else int(self.itc.argmax())

    def word_overlays(self, view: Image.Image) -> list[tuple[str, str]]:
        """Each word of the caption with its map over the view of the encoder, as an inline PNG."""
        if self.words is None or self.word_maps is None:
            return []
        pairs = zip(self.words, self.word_maps, strict=True)
        return [(word.strip(), self.overlay(view, map_P)) for word, map_P in pairs]


def attend(model: LoadedModel, features_1PC: Tensor, text: str | None, caption: str | None) -> Attention:
    """See `Blip2.attend`.

    Args:
        caption: what a stage-2 model writes of the image; None for a stage-1 model.
    """
    if text is not None and text.strip():
        attention = _with_text(model, features_1PC, text.strip())
    else:
        stage = model.stage2 or model.stage1
        shadow, recorded = recording(qformer_of(stage))
        with torch.no_grad():
            _queries(model, shadow, stage, features_1PC)
        attention = Attention(grid_of(model), model.vision.prefix, cross_layers(qformer_of(stage)), recorded.maps())
    if caption is not None:
        _add_words(model, features_1PC, caption, attention)
    return attention


def _with_text(model: LoadedModel, features_1PC: Tensor, text: str) -> Attention:
    """ITC and ITM of one pair, with their maps."""
    stage1 = model.stage1
    ids, mask = model.text_ids([text])
    with torch.no_grad():
        kv = stage1.project_image(features_1PC)
        text_E = stage1.embed_texts(ids, mask)[0]
    with torch.enable_grad():
        shadow, recorded = recording(stage1.qformer)
        queries_1QD, _ = shadow.encode_queries(kv)
        itc_Q = stage1.image_embeddings(queries_1QD)[0] @ text_E
        itc_maps = recorded.relevance(itc_Q.max())
    layers = cross_layers(stage1.qformer)
    attention = Attention(grid_of(model), model.vision.prefix, layers, recorded.maps(), text, to_host(itc_Q), itc_maps)
    if model.has_itm:
        with torch.enable_grad():
            shadow, recorded = recording(stage1.qformer)
            logits_12 = stage1.pair_logits(shadow.encode_pair(ids, mask, kv))
            attention.itm_maps = recorded.relevance(logits_12[0, 1])
        attention.itm = float(logits_12.detach().softmax(dim=-1)[0, 1])
        attention.pair_queries = recorded.maps()
    return attention


def _add_words(model: LoadedModel, features_1PC: Tensor, caption: str, attention: Attention) -> None:
    """How each token of the caption attended to the soft prompts."""
    stage2, tokenizer, prompt = model.stage2, model.language_tokenizer, model.config.language.prompt
    assert stage2 is not None
    shadow, recorded = recording(qformer_of(stage2))
    with torch.no_grad():
        queries_1QD = _queries(model, shadow, stage2, features_1PC)
        soft_1QH = stage2.language_proj(queries_1QD)
    if stage2.language_model.encoder_decoder:
        enc_ids, enc_mask, ids, mask = (x.to(model.device) for x in tokenizer.pairs([prompt], [caption]))
        at_W = torch.arange(int(mask.sum()) - 1)  # all but the end token
        word_prompts = prompt_attention(stage2.language_model, soft_1QH, enc_ids, enc_mask, ids)[at_W]
    else:
        ids, mask, labels = (x.to(model.device) for x in tokenizer.targets([prompt], [caption]))
        at_W = to_host(labels[0].nonzero()[:, 0])[:-1]
        word_prompts = prompt_attention(stage2.language_model, soft_1QH, ids, mask)[soft_1QH.shape[1] + at_W - 1]
    attention.caption, attention.word_prompts = caption, word_prompts
    attention.words = [tokenizer.decode([token]) for token in to_list(to_host(ids[0])[at_W])]
    shares_WQ = word_prompts / word_prompts.sum(dim=1, keepdim=True).clamp(min=1e-9)
    attention.word_maps = shares_WQ @ recorded.maps()[-1]


def _queries(model: LoadedModel, shadow: QFormer, stage: Stage1 | Stage2, features_1PC: Tensor) -> Tensor:
    """Query outputs [1, Q, D]; where a stage 2's Q-Former reads prompts, beside that of its captions."""
    image_kv, reader = shadow.project_image(features_1PC, stage.ln_vision), model.instruction_reader
    read = None if reader is None or stage is not model.stage2 else reader([model.config.language.prompt], None)
    if read is None:
        return shadow.encode_queries(image_kv)[0]
    ids, mask = (x.to(model.device) for x in read)
    return shadow.encode_pair(ids, mask, image_kv)


def grid_of(model: LoadedModel) -> tuple[int, int]:
    """Rows and columns of patches that the queries see."""
    side = model.vision.grid // model.vision.pool
    return side, side


def qformer_of(stage: Stage1 | Stage2) -> QFormer:
    """The Q-Former of a stage.

    Raises:
        ConfigError: the run has a linear layer in its place.
    """
    if not isinstance(stage.qformer, QFormer):
        raise ConfigError(
            "this run has a linear layer in place of the Q-Former (qformer.bridge): there is no attention"
        )
    return stage.qformer


def cross_layers(qformer: QFormer) -> list[int]:
    """Numbers of the layers that have cross-attention."""
    return [n for n, layer in enumerate(qformer._layers()) if layer.cross_attention is not None]
