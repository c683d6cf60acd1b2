"""Token ids of the Q-Former's text and of the language model's prompts and captions.

Shape letters: B texts, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from blip2.configs import BERT_WORDS, BLIP2_TYPES
from blip2.errors import CheckpointError, ConfigError

# OPT has no token for the end of a caption of its own: the checkpoints were trained to end in a
# new line (CHECKPOINTS: "captions end in \n, whose id ends generation").
_ENDS = {"opt": "\n"}
# OPT was trained with `</s>` in front of every text; some of its tokenizer files leave that out.
_ALWAYS_BOS = ("opt",)


def clean_caption(text: str) -> str:
    """A caption in lower case, without marks but the comma and with single spaces.

    What LAVIS's `blip_caption` does; marks that a data set set apart (`snow .`) go too.
    """
    text = re.sub(r"[.!?\"()*#:;~]", " ", text.lower())
    return re.sub(r"\s+(,|$)", r"\1", re.sub(r"\s+", " ", text)).strip(" ,")


def checked_text(text: str) -> str:
    """The text as it is.

    Raises:
        ConfigError: it is no valid Unicode: half of a surrogate pair, or bytes of a command line that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"text is not valid Unicode (UTF-8): {shorten(text, 60)!r}") from None
    return text


# Where a processor of InstructBLIP keeps the tokenizer of its Q-Former, beside that of its language model.
QFORMER_TOKENIZER = "qformer_tokenizer"


class QFormerTokenizer:
    """Tokenizer of a BERT-type checkpoint, with [DEC] as one more word.

    Args:
        folder: what `AutoTokenizer.from_pretrained` takes.
        max_text: longest text in tokens, [CLS] and [SEP] included; longer ones are cut.
    """

    def __init__(self, folder: str, max_text: int) -> None:
        own = Path(folder) / QFORMER_TOKENIZER
        self._tokenizer = _load(str(own) if own.is_dir() else folder)
        self.max_text = max_text
        self.dec_id: int = _model_vocab(folder, self._tokenizer)
        self.vocab_size = self.dec_id + 1
        self.cls_id: int = self._tokenizer.cls_token_id
        self.sep_id: int = self._tokenizer.sep_token_id
        self.pad_id: int = self._tokenizer.pad_token_id

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Right-padded ids [B, T] int64 and mask [B, T] bool, trimmed to the longest."""
        rows = self._tokenizer(list(map(checked_text, texts)), truncation=True, max_length=self.max_text)["input_ids"]
        return _pad(rows, self.pad_id)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._tokenizer.decode([i for i in ids if i != self.dec_id], skip_special_tokens=True)).strip()


@dataclass(frozen=True)
class InstructionReader:
    """What the Q-Former of a stage 2 reads beside its queries, as ids.

    Args:
        tokenizer: of its text branch.
        reads: `qformer.instruction`: `prompt` or `question`.
    """

    tokenizer: QFormerTokenizer
    reads: str

    def __call__(self, prompts: Sequence[str], questions: Sequence[str] | None) -> tuple[Tensor, Tensor] | None:
        """Ids and mask [N, T] of N prompts, or of the bare questions in them; None where there are none."""
        texts = prompts if self.reads == "prompt" else questions
        return None if texts is None else self.tokenizer(list(texts))


class LanguageTokenizer:
    """Tokenizer of a language model.

    Args:
        folder: what `AutoTokenizer.from_pretrained` takes.
        start: text of the special token in front of every text of a decoder-only model; None takes the tokenizer's.
        end: text whose token ends a caption; None takes the model's own ("\\n" for OPT).
        max_text: longest caption in tokens, end token included; longer ones are cut.
        encoder_decoder: which kind of model it is for.
    """

    def __init__(
        self, folder: str, *, end: str | None, max_text: int, encoder_decoder: bool, start: str | None = None
    ) -> None:
        self._tokenizer = _load(folder)
        self.max_text, self.encoder_decoder = max_text, encoder_decoder
        kind = _model_type(folder)
        self._front = self._leading()
        if not self._front and kind in _ALWAYS_BOS and self._tokenizer.bos_token_id is not None:
            self._front = [self._tokenizer.bos_token_id]
        if start is not None:
            self._front = self._plain(start)
            if len(self._front) != 1:
                raise ConfigError(f"language.start is {start!r}: it must be one token of {folder}")
        if end is None:
            end = _ENDS.get(kind)
        self.end_id = self._end(end)
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else pad

    @property
    def front(self) -> int:
        """How many special tokens stand in front of every text of a decoder-only model (OPT: `</s>`)."""
        return 0 if self.encoder_decoder else len(self._front)

    def marks(self, template: str | None, images: int) -> list[Tensor]:
        """Ids of the text in front of each of several images, `template` with its number from 1; none without one."""
        if template is None or images == 1:
            return []
        return [torch.tensor(self._plain(template.replace("{}", str(n + 1))), dtype=torch.int64) for n in range(images)]

    def prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Left-padded prompts for generation: ids and mask [B, T] bool; T may be 0."""
        rows = [self._prompt(text) for text in texts]
        return _pad(rows, self.pad_id, left=True)

    def targets(self, prompts: list[str], captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt + caption + end token for a decoder-only model, right-padded.

        Returns:
            ids, mask and labels [B, T]; labels are True on the caption and its end token.
        """
        heads = [self._prompt(prompt) for prompt in prompts]
        tails = [
            [*self._plain(f" {caption.strip()}" if prompt else caption.strip())[: self.max_text - 1], self.end_id]
            for prompt, caption in zip(prompts, captions, strict=True)
        ]
        ids, mask = _pad([h + t for h, t in zip(heads, tails, strict=True)], self.pad_id)
        starts = torch.tensor([len(head) for head in heads])
        labels = mask & (torch.arange(ids.shape[1])[None, :] >= starts[:, None])
        return ids, mask, labels

    def pairs(self, prefixes: list[str], suffixes: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For an encoder-decoder: ids and mask of the encoder's text, then of the decoder's.

        Both end in the end token, as the model was trained.
        """
        encoder = [[*self._plain(text)[: self.max_text - 1], self.end_id] for text in prefixes]
        decoder = [[*self._plain(text)[: self.max_text - 1], self.end_id] for text in suffixes]
        return *_pad(encoder, self.pad_id), *_pad(decoder, self.pad_id)

    def decode(self, ids: list[int]) -> str:
        """Text of ids up to the end token, without special tokens."""
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _prompt(self, text: str) -> list[int]:
        """Ids with the special tokens that the model was trained with (OPT's `</s>` in front)."""
        if not self.encoder_decoder:
            return self._front + self._plain(text)
        ids: list[int] = self._tokenizer(checked_text(text))["input_ids"]
        return ids

    def _leading(self) -> list[int]:
        """The special tokens in front of a text; what comes behind would close the text to be continued."""
        with_specials: list[int] = self._tokenizer("a")["input_ids"]
        plain = self._plain("a")
        return next(
            (with_specials[:n] for n in range(len(with_specials)) if with_specials[n : n + len(plain)] == plain), []
        )

    def _end(self, text: str | None) -> int:
        if text is not None:
            ids = self._plain(text)
            if not ids:
                raise ConfigError(f"language.end is {text!r}: it must be a text that has a token")
            return ids[-1]
        end: int | None = self._tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                "language.end is None, but the tokenizer has no end token: give the text that ends a caption"
            )
        return end

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(checked_text(text), add_special_tokens=False)["input_ids"]
        return ids


def _load(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more special
        reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({reason})") from error
    # for want of files transformers makes up special tokens, and for T5 the word "▁"
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise CheckpointError(f"{folder}: no tokenizer in it: copy its files there")
    return tokenizer


def _config(folder: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return None


def _model_type(folder: str) -> str:
    config = _config(folder)
    if getattr(config, "model_type", "") in BLIP2_TYPES:
        config = config.text_config
    return str(getattr(config, "model_type", ""))


def _model_vocab(folder: str, tokenizer: Any) -> int:
    """Rows of the model's own word embedding: [DEC] comes after them, or is the last of a BLIP-2 Q-Former's."""
    config = _config(folder)
    if getattr(config, "model_type", "") in BLIP2_TYPES:
        rows = int(config.qformer_config.vocab_size)
        return rows if rows == BERT_WORDS and config.model_type == "blip-2" else rows - 1
    return int(getattr(config, "vocab_size", None) or len(tokenizer))


def _pad(rows: list[list[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.int64)
        mask[number, place] = True
    return ids, mask
