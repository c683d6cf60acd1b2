"""Any frozen language model of transformers, always through `inputs_embeds`.

Shape letters: B rows, Q queries (soft prompts), T text tokens, S prompts and text together,
H width of the input embeddings, V vocabulary, M target positions, L new tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2.configs import DecodingConfig, LanguageConfig
from blip2.errors import ConfigError
from blip2.models import towers
from blip2.models.freezing import freeze, is_adapter
from blip2.models.generation.generate import Prompts, generate
from blip2.models.language import quantize, shared_prefix
from blip2.ops.attention import fast_kernels
from blip2.ops.bucketing import bucket, length_groups
from blip2.ops.devices import fast_dtype, to_list
from blip2.ops.losses import head_loss

Reduction = Literal["mean", "none"]

# Decoder-only types whose logits are the output head of the last hidden state and nothing more.
# Others (Cohere and Granite scale their logits, Gemma 2 caps them) go through their own forward.
_PLAIN_HEADS = {
    *("bloom", "falcon", "gemma", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "olmo", "olmo2"),
    *("opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"),
}
# Encoder-decoders of that kind.
_PLAIN_HEADS_ENCODED = {"t5", "mt5", "umt5"}
_GROUP_OVERHEAD = 32  # tokens of a CPU's time that one more group of rows costs
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class LanguageModel(nn.Module):
    """Decoder-only or encoder-decoder language model that reads soft prompts in front of text.

    While all its own weights are frozen it stays in eval mode whatever `.train()` says, except for the
    dropout of adapters (`blip2.models.language.lora`); gradients flow through it to the soft prompts. Prompts
    of any dtype are cast to that of its embeddings.

    Args:
        model: transformers `...ForCausalLM` or `...ForConditionalGeneration`.

    Attributes:
        hidden_size: width H of the input embeddings.
        vocab_size: rows of the input embeddings.
        encoder_decoder: whether it has an encoder, which decides between the two losses.
        gradient_checkpointing: recompute every block in the backward pass instead of keeping its
            activations; off by default. transformers' own works in train mode only, where a
            frozen model would apply dropout.
        head_chunk: rows of logits held at a time while training (`chunk_head`); None holds all.
        split_lengths: on a CPU, `decoder_loss` runs rows of similar length together instead of
            padding all to the longest; on by default, off under FSDP2, whose processes must run
            the model equally often. Compiled blocks run all rows together, padded to one of a few
            lengths.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        embeddings = model.get_input_embeddings()
        self.hidden_size: int = embeddings.embedding_dim
        self.vocab_size: int = embeddings.num_embeddings
        self.encoder_decoder: bool = bool(model.config.is_encoder_decoder)
        self.gradient_checkpointing = False
        self.head_chunk: int | None = None
        self.split_lengths = True
        self._compiled: dict[int, Callable[..., Any]] = {}
        for number, block in enumerate(_blocks(model)):
            block.forward = functools.partial(self._run_block, number, block.forward)

    @property
    def frozen(self) -> bool:
        """Whether none of its own weights trains; adapters may."""
        return not any(p.requires_grad and not is_adapter(name) for name, p in self.model.named_parameters())

    def train(self, mode: bool = True) -> LanguageModel:
        """As `nn.Module.train`, but frozen weights stay in eval mode."""
        super().train(mode and not self.frozen)
        for name, module in self.model.named_modules():
            if is_adapter(name):
                module.train(mode)
        return self

    def chunk_head(self, rows: int | None) -> None:
        """Compute at most so many rows of logits at a time in the losses; None computes all at once.

        Raises:
            ConfigError: the logits of this model are more than its output head computes.
        """
        if rows is not None and not self._head_is_plain():
            kind = self.model.config.model_type
            raise ConfigError(f"train.head_chunk is {rows}: not known to be right for a {kind} model, set it to null")
        self.head_chunk = rows

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks for passes with gradients; takes the options of `torch.compile`."""
        blocks: list[Any] = _blocks(self.model)
        forwards = [block.forward.args[1] for block in blocks]
        self._compiled = {number: torch.compile(forward, **options) for number, forward in enumerate(forwards)}

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Input embeddings [B, T, H], scaled as the model does itself when given ids."""
        out: Tensor = self.model.get_input_embeddings()(ids_BT)
        return out

    @property
    def room(self) -> int | None:
        """Tokens that a decoder-only model reads and writes in all, soft prompts included; None: no bound of its own.

        Positions are learned or rotated up to a number that the model's config names; an encoder-decoder's are
        relative.
        """
        longest = getattr(self.model.config, "max_position_embeddings", None)
        return None if self.encoder_decoder or longest is None else int(longest)

    @property
    def compiled(self) -> bool:
        """Whether its blocks run compiled while training."""
        return bool(self._compiled)

    def decoder_loss(
        self,
        prompt_BQH: Tensor,
        ids_NT: Tensor,
        mask_NT: Tensor,
        labels_NT: Tensor,
        *,
        prompt_mask_BQ: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Cross-entropy of the labelled tokens after the soft prompts, in float32; decoder-only.

        The output head runs only where the next token is a label. The first token may be one: the
        last soft prompt predicts it. Where an image has several texts, its soft prompts (and what all
        texts begin with) are read once, unless `gradient_checkpointing`, a compiled block or the kind
        of model forbids it; the losses are the same.

        Args:
            prompt_BQH: at least one soft prompt.
            ids_NT: right-padded texts, N a multiple of B: text n is about image n mod B.
            mask_NT: 1 or True on real tokens.
            labels_NT: bool, True on the tokens to predict.
            prompt_mask_BQ: bool, False on padding in front of the soft prompts of rows that have fewer; None: none has.
            reduction: `mean` over all targets, or `none`.

        Returns:
            Scalar; with `none` [M], in the order of `ids_NT[labels_NT]`.
        """
        ids_NT, mask_NT, labels_NT = self._bucketed(ids_NT, mask_NT, labels_NT)
        B, N = len(prompt_BQH), len(ids_NT)
        if N % B:
            raise ValueError(f"{N} texts for the soft prompts of {B} images: text n is about image n mod {B}")
        shared = N > B and prompt_mask_BQ is None
        loss_M = self._shared_losses(prompt_BQH, ids_NT, mask_NT, labels_NT) if shared else None
        if loss_M is None:
            prompt_NQH = prompt_BQH.repeat(N // B, 1, 1)
            real_NQ = None if prompt_mask_BQ is None else prompt_mask_BQ.repeat(N // B, 1)

            def part(g: Tensor, n: int) -> Tensor:
                real_BQ = None if real_NQ is None else real_NQ[g]
                return self._target_losses(prompt_NQH[g], real_BQ, *(x[g, :n] for x in (ids_NT, mask_NT, labels_NT)))

            loss_M = self._in_groups(prompt_BQH.shape[1], mask_NT, labels_NT, part)
        return loss_M.mean() if reduction == "mean" else loss_M

    def encoder_decoder_loss(
        self,
        prompt_BQH: Tensor,
        enc_ids_BT: Tensor,
        enc_mask_BT: Tensor,
        dec_ids_BT: Tensor,
        dec_mask_BT: Tensor,
        *,
        prompt_mask_BQ: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Cross-entropy of the decoder's tokens, in float32; encoder-decoder.

        Args:
            prompt_BQH: soft prompts, in front of the encoder's text.
            enc_ids_BT, enc_mask_BT: right-padded text of the encoder (T may be 0) and its mask.
            dec_ids_BT, dec_mask_BT: right-padded tokens to predict, end token included, and their
                mask; the start token is put in front here.
            prompt_mask_BQ: as in `decoder_loss`.
            reduction: `mean` over all targets, or `none`.

        Returns:
            Scalar; with `none` [M], in the order of `dec_ids_BT[dec_mask_BT]`.
        """
        enc_ids_BT, enc_mask_BT = self._bucketed(enc_ids_BT, enc_mask_BT)
        dec_ids_BT, dec_mask_BT = self._bucketed(dec_ids_BT, dec_mask_BT)
        embeds_BSH, mask_BS = self._join(prompt_BQH, enc_ids_BT, enc_mask_BT, prompt_mask_BQ)
        if prompt_mask_BQ is not None:
            embeds_BSH, mask_BS, _ = self._unpadded(embeds_BSH, mask_BS, mask_BS)
        return self.encoded_loss(embeds_BSH, mask_BS, dec_ids_BT, dec_mask_BT, reduction=reduction)

    def encoded_loss(
        self,
        embeds_BSH: Tensor,
        mask_BS: Tensor,
        dec_ids_BT: Tensor,
        dec_mask_BT: Tensor,
        *,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """As `encoder_decoder_loss`, after whatever the encoder is given as embeddings."""
        start = torch.full_like(dec_ids_BT[:, :1], self.model.config.decoder_start_token_id)
        options: dict[str, Any] = {"inputs_embeds": embeds_BSH, "attention_mask": mask_BS, "use_cache": False}
        options["decoder_input_ids"] = torch.cat([start, dec_ids_BT[:, :-1]], dim=1)
        at_BT = dec_mask_BT.bool()
        if not self._head_is_plain():
            logits_MV = self.model(**options).logits[at_BT]
            return F.cross_entropy(logits_MV.float(), dec_ids_BT[at_BT], reduction=reduction)
        with self._head_input() as caught:
            self.model(**options)
        head = self.model.get_output_embeddings()
        loss_M = head_loss(caught[0][at_BT], head, dec_ids_BT[at_BT], rows=self.head_chunk)
        return loss_M.mean() if reduction == "mean" else loss_M

    @torch.no_grad()  # not inference_mode: a block that FSDP2 gathers first in it cannot be trained through
    def generate(
        self,
        prompt_BQH: Tensor,
        ids_BT: Tensor,
        mask_BT: Tensor,
        decoding: DecodingConfig,
        *,
        end_id: int | Sequence[int],
        pad_id: int,
        images_B: Tensor | None = None,
        examples_1SH: Tensor | None = None,
    ) -> Tensor:
        """New tokens after soft prompts and text, without gradient.

        The ids of transformers' `generate`, but every row is read once, not once per beam, and
        leaves the batch when it is done.

        Args:
            prompt_BQH: soft prompts, a row for each of `ids_BT` unless `images_B` is given.
            ids_BT, mask_BT: text (T may be 0) and its mask, padded on either side; the padding is
                moved so that each row's soft prompts and text are adjacent.
            decoding: beams or sampling, lengths and penalties; `min_tokens` and `max_tokens` count the end token.
            end_id: token or tokens that end a row; part of the result.
            pad_id: fills the rest of a row (beam search fills with the end where it is 0).
            images_B: the row of `prompt_BQH` that each text is about; a decoder-only model then
                reads the soft prompts of an image once for all its texts.
            examples_1SH: one sequence that stands in front of every row, as `interleave` joins it; a decoder-only
                model reads it once for all B.

        Returns:
            ids [B * decoding.num, at most decoding.max_tokens], the results of a row next to each other.
        """
        self._check_width(prompt_BQH)
        if examples_1SH is None:
            soft, (text, mask) = prompt_BQH, (self.embed(ids_BT), mask_BT.to(torch.int64))
        else:
            soft, (text, mask) = examples_1SH, self._join(prompt_BQH, ids_BT, mask_BT)
            images_B = torch.zeros(len(ids_BT), dtype=torch.int64, device=ids_BT.device)
        prompts = Prompts(soft.to(text.dtype), text, mask, images_B)
        ends = (end_id,) if isinstance(end_id, int) else tuple(end_id)
        return generate(self.model, prompts, decoding, ends=ends, pad_id=pad_id)

    def _target_losses(
        self, prompt_BQH: Tensor, real_BQ: Tensor | None, ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor
    ) -> Tensor:
        """Cross-entropy [M] of the labelled tokens, in the order of `ids_BT[labels_BT]`."""
        embeds_BSH, mask_BS = self._join(prompt_BQH, ids_BT, mask_BT, real_BQ)
        at_BS = torch.zeros_like(mask_BS, dtype=torch.bool)
        at_BS[:, prompt_BQH.shape[1] - 1 : -1] = labels_BT
        if real_BQ is not None:
            embeds_BSH, mask_BS, at_BS = self._unpadded(embeds_BSH, mask_BS, at_BS)
        return self.losses_at(embeds_BSH, mask_BS, at_BS, ids_BT[labels_BT])

    def losses_at(self, embeds_BSH: Tensor, mask_BS: Tensor, at_BS: Tensor, targets_M: Tensor) -> Tensor:
        """Cross-entropy [M] of target tokens at the places that predict them, in float32; decoder-only.

        Args:
            at_BS: bool, True where the next token is a target.
            targets_M: those tokens, in the order of `at_BS`.
        """
        if self._head_is_plain():
            output = self.model.base_model(inputs_embeds=embeds_BSH, attention_mask=mask_BS, use_cache=False)
            head, x_MH = self.model.get_output_embeddings(), output.last_hidden_state[at_BS]
            return head_loss(x_MH, head, targets_M, rows=self.head_chunk)
        output = self.model(inputs_embeds=embeds_BSH, attention_mask=mask_BS, use_cache=False)
        logits_MV = output.logits[at_BS]
        return F.cross_entropy(logits_MV.float(), targets_M, reduction="none")

    def _shared_losses(self, prompt_BQH: Tensor, ids_NT: Tensor, mask_NT: Tensor, labels_NT: Tensor) -> Tensor | None:
        """As `_target_losses` over all texts, every image read once; None where this model cannot."""
        if self.gradient_checkpointing or self._compiled or not self._head_is_plain():
            return None
        self._check_width(prompt_BQH)
        decoder, head = self.model.base_model, self.model.get_output_embeddings()
        images, lead = len(prompt_BQH), shared_prefix.common_lead(ids_NT, mask_NT, labels_NT)
        text_NTH = self.embed(ids_NT)
        joined_BSH = torch.cat([prompt_BQH.to(text_NTH.dtype), text_NTH[:images, :lead]], dim=1)
        prefix = shared_prefix.read(decoder, joined_BSH)
        if prefix is None:
            return None
        ids_NT, mask_NT, labels_NT, text_NTH = (x[:, lead:] for x in (ids_NT, mask_NT, labels_NT, text_NTH))

        def part(g: Tensor, n: int) -> Tensor:
            states_NTH = shared_prefix.states_before(decoder, prefix, g % images, text_NTH[g, :n], mask_NT[g, :n])
            at_NT = labels_NT[g, :n]
            return head_loss(states_NTH[at_NT], head, ids_NT[g, :n][at_NT], rows=self.head_chunk)

        return self._in_groups(0, mask_NT, labels_NT, part)

    def _in_groups(
        self, prompts: int, mask_NT: Tensor, labels_NT: Tensor, part: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """Losses [M] of all texts in order, from `part(rows, longest)` over rows of similar length."""
        groups = self._length_groups(prompts, mask_NT)
        if len(groups) == 1:
            return part(torch.arange(len(mask_NT), device=mask_NT.device), mask_NT.shape[1])
        losses = [part(g, int(mask_NT[g].sum(1).max())) for g in groups]
        rows_M = torch.cat([g.repeat_interleave(labels_NT[g].sum(1)) for g in groups])
        return torch.cat(losses)[torch.argsort(rows_M, stable=True)]

    @contextlib.contextmanager
    def _head_input(self) -> Iterator[list[Tensor]]:
        """Catch the input of the output head, and give the head an empty one."""
        caught: list[Tensor] = []

        def catch(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(args[0])
            return (args[0][:, :0],)

        handle = self.model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            yield caught
        finally:
            handle.remove()

    def _length_groups(self, prompts: int, mask_BT: Tensor) -> list[Tensor]:
        """Rows to run together: on a CPU, groups of similar length, since padding costs as much as text there."""
        if not self.split_lengths or self._compiled or mask_BT.device.type != "cpu":
            return [torch.arange(len(mask_BT), device=mask_BT.device)]
        lengths = to_list(prompts + mask_BT.sum(1))
        return [torch.tensor(group) for group in length_groups(lengths, overhead=_GROUP_OVERHEAD)]

    def _bucketed(self, *texts_NT: Tensor) -> tuple[Tensor, ...]:
        """Texts with their masks, padded by a column or more to one of a few lengths where compiled blocks run.

        By at least one: without padding a model leaves its mask out, which would compile other code.
        """
        if not self._compiled or not torch.is_grad_enabled():
            return texts_NT
        longest = texts_NT[0].shape[1]
        return tuple(F.pad(x_NT, (0, bucket(longest + 1) - longest)) for x_NT in texts_NT)

    def _join(
        self, prompt_BQH: Tensor, ids_BT: Tensor, mask_BT: Tensor, real_BQ: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, H] of soft prompts and text, and their int64 mask [B, S]."""
        self._check_width(prompt_BQH)
        text_BTH = self.embed(ids_BT)
        ones_BQ = torch.ones(prompt_BQH.shape[:2], dtype=torch.int64, device=mask_BT.device)
        ones_BQ = ones_BQ if real_BQ is None else real_BQ.to(torch.int64)
        embeds_BSH = torch.cat([prompt_BQH.to(text_BTH.dtype), text_BTH], dim=1)
        return embeds_BSH, torch.cat([ones_BQ, mask_BT.to(torch.int64)], dim=1)

    @staticmethod
    def _unpadded(embeds_BSH: Tensor, mask_BS: Tensor, at_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows whose padding in front is moved to the right edge, so that every model counts positions from 0."""
        order_BS = torch.argsort(mask_BS, dim=1, stable=True, descending=True)
        embeds_BSH = embeds_BSH.gather(1, order_BS[..., None].expand_as(embeds_BSH))
        return embeds_BSH, mask_BS.gather(1, order_BS), at_BS.gather(1, order_BS)

    def _check_width(self, prompt_BQH: Tensor) -> None:
        if prompt_BQH.shape[-1] != self.hidden_size:
            raise ConfigError(f"soft prompts are {prompt_BQH.shape[-1]} wide, the language model {self.hidden_size}")

    def _head_is_plain(self) -> bool:
        config = self.model.config
        scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _LOGIT_SETTINGS)
        return config.model_type in (_PLAIN_HEADS_ENCODED if self.encoder_decoder else _PLAIN_HEADS) and not scaled

    def _run_block(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        forward = self._compiled.get(number, forward)
        if self.gradient_checkpointing:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        hidden = args[0] if args else kwargs["hidden_states"]
        with fast_kernels(hidden):
            return forward(*args, **kwargs)


def load_language_model(
    config: LanguageConfig,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    device_map: str | dict[str, Any] | None = None,
) -> LanguageModel:
    """Frozen language model of a tower's name, a folder or a hub id.

    Args:
        dtype: of the weights; None takes bfloat16 where the hardware multiplies it fast, else
            float32.
        device: where the model will run. One that `config.quantize` quantizes is loaded for it,
            layer by layer; any other is loaded on the CPU, to be moved.
        device_map: passed to transformers, to spread a large model over devices.

    Raises:
        CheckpointError: the model cannot be found, reached or read completely.
        ConfigError: a T5 in float16, in which its activations overflow; `config.quantize` cannot
            be done on this device.
    """
    source = towers.folder(config.name)
    part, inside = towers.load_part_config(config.name, "text_config")
    options: dict[str, Any] = {"key_mapping": {r"^language_model\.": ""}} if inside else {}
    if device_map is not None:
        options["device_map"] = device_map
    if dtype == torch.float16 and "t5" in part.model_type:
        raise ConfigError(f"language.name is {config.name!r}: T5 overflows in float16, use bf16 or fp32")
    dtype = dtype or fast_dtype(device)
    if config.quantize:
        options = quantize.loading_options(config.quantize, torch.device(device), dtype) | options
    loaded = towers.load_model(auto_class(part), source, part, dtype, **options)
    if config.quantize:
        quantize.prepare(loaded, source)
    model = LanguageModel(loaded)
    freeze(model)
    return model


def parameter_count(config: LanguageConfig) -> int:
    """About how many parameters a language model has, from its config: blocks of 12 width², and the embeddings.

    A config that does not say counts as a large one.
    """
    part, _ = towers.load_part_config(config.name, "text_config")
    layers, width, words = (getattr(part, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    if not (isinstance(layers, int) and isinstance(width, int) and isinstance(words, int)):
        return 1 << 62
    return 12 * layers * width**2 * (2 if part.is_encoder_decoder else 1) + words * width


def auto_class(config: Any) -> Any:
    """transformers' class of a language model by its config."""
    import transformers

    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def language_model_from_config(config: Any) -> LanguageModel:
    """Frozen language model with random float32 weights; without memory inside `torch.device("meta")`."""
    built = auto_class(config).from_config(config, dtype=torch.float32)
    head, embeddings = built.get_output_embeddings(), built.get_input_embeddings()
    # transformers ties every T5 built from a config; this setting marks those published with a separate head
    if getattr(config, "scale_decoder_outputs", True) is False and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model = LanguageModel(built)
    freeze(model)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Transformer blocks: the members of the longest `nn.ModuleList`, and of any other of the same block type."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    longest = max((len(m) for m in lists), default=0)
    kinds = {type(m[0]) for m in lists if len(m) == longest}
    return [block for m in lists if len(m) and type(m[0]) in kinds for block in m]
