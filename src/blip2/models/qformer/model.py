"""The Querying Transformer (arXiv 2301.12597, section 3.1) and its image keys/values.

A BERT-type encoder in which queries and text share self-attention and have feed-forwards of their
own, and the queries attend to the image in every second layer. An image is projected to keys and
values once (`project_image`); every pass over it takes that `ImageKV`:

    image_kv = qformer.project_image(features)                # [B, P, C] -> keys/values, once
    queries, cache = qformer.encode_queries(image_kv)         # ITC, stage 2: queries alone
    cls = qformer.encode_text(ids, mask)                      # ITC: text alone
    queries = qformer.encode_pair(ids, mask, image_kv)        # ITM: all see all
    logits = qformer.decode_text(ids, mask, cache, at)        # ITG: causal, on the cached queries

Text is held packed: the linear layers run on real tokens only, attention alone sees the padded
shape. Where several passes read the same text, `embed_tokens` it once and give them the word
vectors in place of `ids`: the gradient of a lookup is as large as the vocabulary.

Shape letters: B images, N rows (pairs), Q queries, T text tokens, M real text tokens, P patches, C
image-encoder channels, D Q-Former width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2.models.qformer.layers import Attention, FeedForward, KeyValue, Packing, QFormerLayer
from blip2.ops.devices import to_list
from blip2.ops.masks import bidirectional_mask, multimodal_causal_mask


@dataclass(frozen=True)
class ImageKV:
    """Keys and values [B, heads, P, D / heads] of B images, one pair per cross-attention layer."""

    layers: list[KeyValue]

    def __len__(self) -> int:
        return self.layers[0][0].shape[0]

    def select(self, index_N: Tensor) -> ImageKV:
        """The images at `index_N`, with repeats allowed; gradients flow back to each."""
        return ImageKV([(keys[index_N], values[index_N]) for keys, values in self.layers])

    def tensors(self) -> list[Tensor]:
        """Keys and values of all layers in turn, as `of` takes them."""
        return [tensor for pair in self.layers for tensor in pair]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> ImageKV:
        """The inverse of `tensors`."""
        return cls(list(zip(tensors[::2], tensors[1::2], strict=True)))


class TextEmbeddings(nn.Module):
    """Word and position embeddings of the text branch (no token types)."""

    def __init__(self, vocab: int, width: int, positions: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab, width)
        self.position = nn.Embedding(positions, width)

    def forward(self, ids_NT: Tensor, packing: Packing) -> Tensor:
        """[N, T] ids or [N, T, D] word vectors -> [M, D], not normalised; positions start at 0 beside queries too."""
        if packing.longest > self.position.num_embeddings:
            raise ValueError(f"text of {packing.longest} tokens, but only {self.position.num_embeddings} positions")
        positions = torch.arange(packing.length, device=ids_NT.device).expand(packing.rows, -1)
        words = packing.pack(ids_NT)
        embedded: Tensor = (words if ids_NT.ndim == 3 else self.word(words)) + self.position(packing.pack(positions))
        return embedded


class LanguageHead(nn.Module):
    """BERT's prediction head; its output matrix is the word embedding."""

    def __init__(self, width: int, vocab: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, x_MD: Tensor, words: nn.Embedding) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x_MD))), words.weight, self.bias)


class QFormer(nn.Module):
    """The Querying Transformer.

    Args:
        width, depth, heads, inner: of the BERT-type encoder (768, 12, 12, 3072 in the paper).
        image_width: channels C of the image features.
        queries: learned query tokens, drawn from N(0, 0.02).
        cross_every: cross-attention in layers 0, N, 2N, ...
        vocab: entries of the text vocabulary, [DEC] included; None builds no text branch
            (stage 2 needs none).
        head: whether the text branch has BERT's prediction head (ITG needs it).
        positions: longest text.

    Attributes:
        gradient_checkpointing: recompute every layer in the backward pass instead of keeping its
            activations; off by default.
        head_chunk: rows of ITG logits held at a time while training; None holds all.
    """

    def __init__(
        self,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        inner: int = 3072,
        image_width: int = 1408,
        queries: int = 32,
        cross_every: int = 2,
        vocab: int | None = 30523,
        head: bool = True,
        positions: int = 512,
        eps: float = 1e-12,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        text_pool: str = "cls",
    ) -> None:
        super().__init__()
        self.text_pool = text_pool
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.width, self.depth, self.image_width, self.num_queries = width, depth, image_width, queries
        drop = {"eps": eps, "dropout": dropout}

        def layer(number: int) -> QFormerLayer:
            cross = None
            if number % cross_every == 0:
                cross = Attention(width, heads, image_width, attention_dropout=attention_dropout, **drop)
            return QFormerLayer(
                Attention(width, heads, width, attention_dropout=attention_dropout, **drop),
                cross,
                FeedForward(width, inner, **drop),
                FeedForward(width, inner, **drop) if vocab is not None else None,
            )

        self.query_tokens = nn.Parameter(torch.empty(queries, width))
        self.embeddings = TextEmbeddings(vocab, width, positions) if vocab is not None else None
        self.embedding_norm = nn.LayerNorm(width, eps=eps)
        self.embedding_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layer(number) for number in range(depth))
        self.head = LanguageHead(width, vocab, eps) if vocab is not None and head else None
        self.gradient_checkpointing = False
        self.head_chunk: int | None = None
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.reset_parameters()

    def lock_text(self) -> None:
        """Freeze the text branch: embeddings, self-attention, text feed-forwards (LiT, arXiv 2111.07991).

        The queries share the self-attention, which is frozen for them too.
        """
        if self.embeddings is not None:
            self.embeddings.requires_grad_(False)
        for layer in self._layers():
            layer.self_attention.requires_grad_(False)
            if layer.text_ff is not None:
                layer.text_ff.requires_grad_(False)
        # the norm of the embeddings is the text's; the queries learn what stands before it
        self.embedding_norm.requires_grad_(False)

    def compile_layers(self, **options: Any) -> None:
        """Compile the layers for passes with gradients; takes the options of `torch.compile`."""
        methods = (QFormerLayer.queries, QFormerLayer.text, QFormerLayer.pair)
        self._compiled = {method.__name__: torch.compile(method, **options) for method in methods}

    def reset_parameters(self) -> None:
        """BERT's initialisation: N(0, 0.02) weights, zero biases."""
        nn.init.normal_(self.query_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def project_image(self, features_BPC: Tensor, norm: nn.LayerNorm | None = None) -> ImageKV:
        """Keys and values of every cross-attention layer, once per image.

        Features of a frozen encoder need no gradient, but a trained norm before the projections would need
        one: a third of the cost of projecting in training. Its scale and shift are therefore folded into
        the projections, with the same keys, values and gradients.

        Args:
            features_BPC: image features, normalised already where there is no `norm`.
            norm: `ln_vision`.
        """
        if features_BPC.shape[-1] != self.image_width:
            raise ValueError(
                f"image features are {features_BPC.shape[-1]} wide, the Q-Former was built for {self.image_width}: "
                "use the image encoder it was trained with"
            )
        folded = norm is not None and torch.is_grad_enabled() and not features_BPC.requires_grad
        if norm is not None:
            features_BPC = features_BPC.to(norm.weight.dtype)
            features_BPC = _normalised(features_BPC, norm) if folded else norm(features_BPC)

        def project(linear: nn.Linear) -> Tensor:
            if norm is not None and folded:
                return F.linear(features_BPC, *_after(norm, linear))
            out: Tensor = linear(features_BPC)
            return out

        crosses = [layer.cross_attention for layer in self._layers() if layer.cross_attention is not None]
        return ImageKV([(c.split(project(c.key)), c.split(project(c.value))) for c in crosses])

    def embed_tokens(self, ids_NT: Tensor) -> Tensor:
        """Word vectors [N, T, D] of ids [N, T], which every pass over text takes in their place."""
        words: Tensor = self._text_branch().word(ids_NT)
        return words

    def encode_queries(self, image_kv: ImageKV) -> tuple[Tensor, list[KeyValue]]:
        """Queries alone look at B images.

        Returns:
            [B, Q, D], and the queries' self-attention keys/values per layer for `decode_text`.
        """
        x_BQD = self._query_embeddings(len(image_kv))
        cache = []
        for layer, image in zip(self._layers(), self._images(image_kv), strict=True):
            x_BQD, key_value = self._run(QFormerLayer.queries, layer, x_BQD, image)
            cache.append(key_value)
        return x_BQD, cache

    def encode_text(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Text alone; returns [N, D]: the output at each row's first token ([CLS]), or the mean over its tokens."""
        packing = self._packing(mask_NT)
        x_MD = self._text_embeddings(ids_NT, packing)
        mask = None if packing.full else packing.mask_NT[:, None, None, :]
        pooled = self.text_pool == "mean"
        for layer in self._layers() if pooled else self._layers()[:-1]:
            x_MD = self._run(QFormerLayer.text, layer, x_MD, packing, mask)
        if pooled:
            return packing.mean(x_MD)
        out: Tensor = self._run(QFormerLayer.text, self._layers()[-1], x_MD, packing, mask, first=True)
        return out

    def encode_pair(self, ids_NT: Tensor, mask_NT: Tensor, image_kv: ImageKV) -> Tensor:
        """Queries and text together, all see all (ITM, VQA).

        Args:
            ids_NT, mask_NT: N texts, right-padded; N is a multiple of the B images.
            image_kv: B images; row n is paired with image n mod B, without a copy of its keys.

        Returns:
            [N, Q, D] query outputs.
        """
        N, images = ids_NT.shape[0], len(image_kv)
        if N % images:
            raise ValueError(f"{N} texts for {images} images: row n is paired with image n mod {images}")
        packing = self._packing(mask_NT)
        x_NQD, x_MD = self._query_embeddings(N), self._text_embeddings(ids_NT, packing)
        mask = None if packing.full else bidirectional_mask(self.num_queries, packing.mask_NT)[:, :, :1]
        for number, (layer, image) in enumerate(zip(self._layers(), self._images(image_kv), strict=True)):
            last = number == self.depth - 1
            x_NQD, x_MD = self._run(QFormerLayer.pair, layer, x_NQD, x_MD, packing, mask, image, last=last)
        return x_NQD

    def decode_text(self, ids_BT: Tensor, mask_BT: Tensor, cache: list[KeyValue], at_BT: Tensor) -> Tensor:
        """Logits of causal text on the cached queries (ITG): `predict` of `decode_states`."""
        return self.predict(self.decode_states(ids_BT, mask_BT, cache, at_BT))

    def decode_states(self, ids_BT: Tensor, mask_BT: Tensor, cache: list[KeyValue], at_BT: Tensor) -> Tensor:
        """Causal text on the cached queries, up to the output head.

        Args:
            ids_BT, mask_BT: right-padded text that starts with [DEC].
            cache: from `encode_queries` over the same B images.
            at_BT: bool, the positions whose next token is predicted; all must be real tokens.

        Returns:
            [number of True in at_BT, D], in row-major order.
        """
        packing = self._packing(mask_BT)
        x_MD = self._text_embeddings(ids_BT, packing)
        mask = multimodal_causal_mask(self.num_queries, packing.mask_NT)[:, :, self.num_queries :]
        for layer, before in zip(self._layers(), cache, strict=True):
            x_MD = self._run(QFormerLayer.text, layer, x_MD, packing, mask, before=before)
        return x_MD[packing.pack(at_BT)]

    @torch.no_grad()
    def generate(
        self, image_kv: ImageKV, *, dec_id: int, end_id: int, min_tokens: int = 5, max_tokens: int = 24
    ) -> list[list[int]]:
        """Greedy ITG captions: what the Q-Former alone says of B images, before any language model.

        Returns:
            Token ids per image, without [DEC] and the end token.
        """
        _, cache = self.encode_queries(image_kv)
        ids_BT = torch.full((len(image_kv), 1), dec_id, dtype=torch.int64, device=self.query_tokens.device)
        ended_B = torch.zeros_like(ids_BT[:, 0], dtype=torch.bool)
        for length in range(max_tokens):
            at_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
            at_BT[:, -1] = True
            logits_BV = self.decode_text(ids_BT, torch.ones_like(at_BT), cache, at_BT)
            if length < min_tokens:
                logits_BV[:, end_id] = -torch.inf
            token_B = logits_BV.argmax(dim=-1).masked_fill(ended_B, end_id)
            ended_B |= token_B == end_id
            ids_BT = torch.cat([ids_BT, token_B[:, None]], dim=1)
            if bool(ended_B.all()):
                break
        return [row[: row.index(end_id)] if end_id in row else row for row in to_list(ids_BT[:, 1:])]

    def predict(self, x_MD: Tensor) -> Tensor:
        """Logits [M, V] of the next token."""
        assert self.head is not None
        assert self.embeddings is not None
        logits: Tensor = self.head(x_MD, self.embeddings.word)
        return logits

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's method: compiled, or recomputed in the backward pass, where that is set."""
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        method = self._compiled.get(method.__name__, method)
        if self.gradient_checkpointing:
            return checkpoint(method, *args, use_reentrant=False, **kwargs)
        return method(*args, **kwargs)

    def _packing(self, mask_NT: Tensor) -> Packing:
        """Padded to one of a few lengths where compiled layers run on it."""
        return Packing(mask_NT, bucketed=bool(self._compiled) and torch.is_grad_enabled())

    def _layers(self) -> list[QFormerLayer]:
        return [layer for layer in self.layers if isinstance(layer, QFormerLayer)]

    def _images(self, image_kv: ImageKV) -> list[KeyValue | None]:
        pairs = iter(image_kv.layers)
        return [next(pairs) if layer.cross_attention is not None else None for layer in self._layers()]

    def _query_embeddings(self, rows: int) -> Tensor:
        x_QD = self.embedding_norm(self.query_tokens)
        out: Tensor = self.embedding_dropout(x_QD.expand(rows, -1, -1))
        return out

    def _text_embeddings(self, ids_NT: Tensor, packing: Packing) -> Tensor:
        out: Tensor = self.embedding_dropout(self.embedding_norm(self._text_branch()(ids_NT, packing)))
        return out

    def _text_branch(self) -> TextEmbeddings:
        if self.embeddings is None:
            raise ValueError("this Q-Former was built without its text branch (vocab=None)")
        return self.embeddings


def _normalised(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A norm without its scale and shift."""
    return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


def _after(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias that apply the norm's scale and shift and `linear` to `_normalised` features."""
    # products of elements, not of matrices: autocast leaves them in the weights' precision
    return linear.weight * norm.weight, linear.bias + (linear.weight * norm.bias).sum(dim=1)
