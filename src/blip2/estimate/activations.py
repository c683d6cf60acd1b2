"""The losses of a step on the meta device, with what a machine's kernels keep for the backward pass.

Meta tensors have shapes but no memory, so a model of any size is run in a second. They know
neither autocast nor fused kernels: `DeviceKernels` makes them keep what those keep.

Shape letters: B batch, N texts, T text tokens, P patches, C image-encoder channels, Q queries, H
language-model width, M target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from blip2.configs import LossConfig, RunConfig
from blip2.models.language.model import LanguageModel
from blip2.models.qformer.model import ImageKV
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.ops import contrastive, losses
from blip2.ops.devices import fast_bf16
from blip2.training.objectives.common import EarlyBackward, Losses, add_up
from blip2.training.objectives.stage1 import Captions
from blip2.training.objectives.stage2 import in_pieces

# A caption with its special tokens: the mean of natural ones, and the longest of a batch.
TEXT_TOKENS, LONGEST_TEXT = 12, 20
# "a photo of": in front of the caption in stage 2, and not predicted.
PROMPT_TOKENS = 3

_MATMULS = {F.linear, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, torch.einsum}
_MATMULS |= {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
_FLOAT32 = {F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.Tensor.softmax}
# Meta kernels of these mind an index that is on the CPU, for its values.
_INDEXED = {torch.Tensor.index_copy, torch.Tensor.index_select, F.embedding, F.cross_entropy}


@dataclass(frozen=True)
class Machine:
    """What a run is estimated for.

    Args:
        accelerator: a GPU or the like, else a CPU.
        autocast: the trained part runs under bf16 autocast.
        frozen: dtype of the frozen models' weights.
    """

    accelerator: bool
    autocast: bool
    frozen: torch.dtype

    @classmethod
    def of(cls, config: RunConfig, accelerator: bool) -> Machine:
        """As the trainer chooses on an accelerator, or on this computer's CPU."""
        fast = accelerator or fast_bf16(torch.device("cpu"))
        precision = config.train.precision
        return cls(
            accelerator,
            autocast=precision == "bf16" or (precision == "auto" and fast),
            frozen=torch.bfloat16 if fast else torch.float32,
        )


class _Parts(nn.Module):
    """An objective of these inputs and parts, whatever the batch."""

    def __init__(self, model: nn.Module, inputs: list[Tensor], parts: Any) -> None:
        super().__init__()
        self.model, self.inputs_, self.parts_ = model, inputs, parts

    def inputs(self, batch: Any, step: int) -> list[Tensor]:
        """As given."""
        return self.inputs_

    def parts(self, batch: Any, step: int, inputs: Sequence[Tensor]) -> Iterator[Losses]:
        """As given."""
        return self.parts_(inputs)


def language_loss(language: LanguageModel, prompts_BQH: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy of texts given soft prompts: text n is about image n mod B."""
    if not language.encoder_decoder:
        ids_NT, mask_NT, labels_NT = texts
        return language.decoder_loss(prompts_BQH, ids_NT, mask_NT, labels_NT)
    enc_ids_NT, enc_mask_NT, dec_ids_NT, dec_mask_NT = texts
    prompts_NQH = prompts_BQH.repeat(len(enc_ids_NT) // len(prompts_BQH), 1, 1)
    return language.encoder_decoder_loss(prompts_NQH, enc_ids_NT, enc_mask_NT, dec_ids_NT, dec_mask_NT)


def _stage1_losses(
    model: Stage1, loss: LossConfig, features_BPC: Tensor, ids_BT: Tensor, mask_BT: Tensor, early: bool = False
) -> list[Tensor]:
    """What `Stage1Objective` keeps in one process, without reading a value of a meta tensor."""
    words_BTD = model.qformer.embed_tokens(F.pad(ids_BT, (1, 0)))
    inputs = [words_BTD, *model.project_image(features_BPC).tensors()]

    def parts(given: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        return _stage1_parts(model, loss, ImageKV.of(given[1:]), Captions(ids_BT, mask_BT, given[0]))

    found = EarlyBackward(_Parts(model, inputs, parts))(None, 0) if early else add_up(parts(inputs))
    return list(found.values())


def _stage1_parts(model: Stage1, loss: LossConfig, image_kv: ImageKV, texts: Captions) -> Iterator[dict[str, Tensor]]:
    """The parts that run backward by themselves, as in `Stage1Objective`."""
    out, ids_BT, mask_BT = {}, texts.ids, texts.mask
    images_BQE, cache = model.embed_images(image_kv)
    if loss.itc or loss.itm:
        texts_BE = model.embed_texts(texts.words, mask_BT)
        i2t_BB = contrastive.query_text_similarity(images_BQE, texts_BE) / model.temp
        t2i_BB = contrastive.text_query_similarity(texts_BE, images_BQE) / model.temp
        if loss.itc:
            targets_BB = contrastive.itc_targets(ids_BT[:, 0], ids_BT[:, 0])
            out["itc"] = losses.itc_loss(i2t_BB, t2i_BB, targets_BB, label_smoothing=loss.itc_smoothing)
        del texts_BE, i2t_BB, t2i_BB
    if loss.itg:
        at_BT, predicted_BT = losses.next_token_positions(mask_BT)
        states_MD = model.qformer.decode_states(texts.causal, mask_BT, cache, at_BT)
        targets_M, rows = ids_BT[predicted_BT], model.qformer.head_chunk
        smoothing = loss.itg_smoothing
        each_M = losses.head_loss(states_MD, model.qformer.predict, targets_M, rows=rows, label_smoothing=smoothing)
        out["itg"] = each_M.mean()
        del states_MD, each_M
    del images_BQE, cache
    if out:
        yield out
    if loss.itm:
        for words_BTD in (texts.words, texts.words[ids_BT[:, 0]]):  # own texts, negative texts
            yield {"itm": losses.itm_loss(model.match_logits(words_BTD, mask_BT, image_kv), ids_BT[:, 0])}
        pairs_N2 = model.match_logits(texts.words, mask_BT, image_kv.select(ids_BT[:, 0]))
        yield {"itm": losses.itm_loss(pairs_N2, ids_BT[:, 0])}


def _stage2_loss(
    model: Stage2, features_BPC: Tensor, ids_NT: Tensor, mask_NT: Tensor, pieces: int | None = None
) -> Tensor:
    """What `Stage2Objective` computes, in pieces or whole; an encoder-decoder gets the whole text on both sides."""
    question = (ids_NT, mask_NT) if model.reads_questions else ()
    prompts_BQH, language = model.soft_prompts(features_BPC, *question), model.language_model
    labels_NT = mask_NT.clone()
    labels_NT[:, :PROMPT_TOKENS] = False
    texts = (ids_NT, mask_NT, *((ids_NT, mask_NT) if language.encoder_decoder else (labels_NT,)))
    if pieces is None:
        return language_loss(language, prompts_BQH, texts)
    # the first piece is the largest and the second meets its gradients: what comes after them adds nothing
    found = in_pieces(texts, len(prompts_BQH), pieces)[:2]

    def parts(given: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
        for images, rows in found:
            yield {"lm": language_loss(language, given[0][images.to(given[0].device)], rows)}

    return EarlyBackward(_Parts(language, [prompts_BQH], parts))(None, 0)["lm"]


class DeviceKernels(TorchFunctionMode):
    """Makes meta tensors keep for the backward pass what a machine's kernels keep.

    - Fused attention keeps its inputs, its output and one number a row, never the matrix of
      weights that its decomposition on meta keeps. A CPU has no fused attention with dropout.
    - An accelerator's dropout keeps a mask of one byte, a CPU's one of the input's dtype.
    - Autocast: matrix products in bf16, on bf16 copies (kept) of float32 weights; on an
      accelerator layer norm and softmax in float32.
    - A meta tensor asked for its truth says no. Models ask whether no text is padded, in order to
      leave their masks out; captions differ in length.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        # bf16 copies of float32 weights, one of each while the forward pass lasts, as autocast holds them
        self._copies: dict[Tensor, Tensor] | None = {}

    def end_forward(self) -> None:
        """Let go of the copies: what is computed again in the backward pass makes its own."""
        self._copies = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        if func is torch.autograd.backward:
            # what is computed again in the backward pass is computed by these kernels too
            with self:
                return _backward(args[0])
        if func in _INDEXED:
            args, kwargs = _together((args, kwargs))
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self.machine.accelerator:
            return self._dropout(*args, **kwargs)
        if self.machine.autocast and func in _MATMULS:
            args, kwargs = self._cast((args, kwargs), torch.bfloat16)
        elif self.machine.autocast and self.machine.accelerator and func in _FLOAT32:
            args, kwargs = self._cast((args, kwargs), torch.float32)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **options: Any,
    ) -> Tensor:
        if self.machine.autocast:
            query, key, value = self._cast((query, key, value), torch.bfloat16)
        mask = attn_mask.to(query.device) if attn_mask is not None else None
        if dropout_p and not self.machine.accelerator:
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, **options)
        out: Tensor = _FusedAttention.apply(query, key, value, mask.to(query.dtype) if mask is not None else None)
        return out

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, training)[0] if training and p else input

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A value, or nested tuples, lists and dicts of them, with every float32 or bf16 tensor in `dtype`."""
        if isinstance(value, tuple | list):
            return type(value)(self._cast(v, dtype) for v in value)
        if isinstance(value, dict):
            return {k: self._cast(v, dtype) for k, v in value.items()}
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bfloat16):
            return value
        if self._copies is not None and value.is_leaf and value.requires_grad and value.dtype != dtype:
            if value not in self._copies:
                self._copies[value] = value.to(dtype)
            return self._copies[value]
        return value.to(dtype)


def _backward(tensors: tuple[Tensor, ...]) -> None:
    """`torch.autograd.backward` behind the place where it asks for modes like this one."""
    ones = tuple(torch.ones_like(tensor) for tensor in tensors)
    engine = torch.autograd.graph._engine_run_backward
    engine(tensors, ones, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _together(given: Any) -> Any:
    """Nested arguments, all their tensors on the meta device where one is."""
    if not any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves(given)):
        return given
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given)


class _FusedAttention(torch.autograd.Function):
    """The output's shape and layout, and what the kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(rows, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
