"""Stage 2: a module that maps a batch to the loss of the language model given the soft prompts.

It holds the model, so that wrapping it (DDP, FSDP2) wraps the whole step.
Shape letters: B images, N texts, T text tokens, Q queries, H language-model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.configs import LanguageConfig
from blip2.data.batch import Batch
from blip2.data.tokenizers import InstructionReader, LanguageTokenizer
from blip2.errors import DataError
from blip2.models.stage2 import Stage2
from blip2.ops import distributed
from blip2.training.objectives.common import Losses, image_features

# Ids and masks of texts [N, T] as the language model's tokenizer returns them; the last one marks what is predicted.
Texts = Sequence[Tensor]

# The most pieces of a batch that the language model reads one after the other, and the fewest tokens of a piece:
# few keep a processor core busy, with few an accelerator would wait for kernel launches.
PIECES = 4
ENOUGH_TOKENS = {"cpu": 64, "accelerator": 1024}


class Stage2Objective(nn.Module):
    """Language modelling of the caption given the soft prompts (section 3.3).

    In a batch of questions the answers are learned and the questions are part of the prompts; a Q-Former
    that reads instructions gets the prompts or the bare questions as well, through `reader`. The soft prompts
    of an image with several texts are computed once, and a decoder-only model reads them once.

    Decoder-only: prompt + caption, loss on the caption and its end token. Encoder-decoder: the
    caption is split at a random word into a prefix for the encoder and a suffix for the decoder;
    the split of a pair is a pure function of (seed, step, key). `token_drop`: see `VisionConfig`.

    Attributes:
        pieces: number of parts of a batch (`parts`); None chooses it by the batch's size (`piece_count`).
    """

    def __init__(
        self,
        model: Stage2,
        tokenizer: LanguageTokenizer,
        config: LanguageConfig,
        seed: int = 0,
        reader: InstructionReader | None = None,
        token_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.config, self.seed = model, tokenizer, config, seed
        self.reader, self.token_drop = reader, token_drop
        self.pieces: int | None = None

    def forward(self, batch: Batch, step: int) -> Losses:
        """The loss `lm`."""
        prompts_BQH, real_BQ, weight, *texts = self.inputs(batch, step)
        return {"lm": self._loss(prompts_BQH, real_BQ, texts, weight)}

    def inputs(self, batch: Batch, step: int) -> list[Tensor]:
        """Soft prompts [B, Q, H], which of them are real, the weight of a predicted token, and the texts (`Texts`)."""
        prompts_BQH, real_BQ = self._soft_prompts(batch)
        if self.model.language_model.encoder_decoder:
            texts = self._split_captions(batch, step)
        else:
            texts = self.tokenizer.targets(self._prompts(batch), batch.captions)
        self._require_room(batch, prompts_BQH.shape[1] + texts[0].shape[1])
        count = int(texts[-1].sum())
        weight = distributed.mean_of_all(torch.tensor(1 / count, device=prompts_BQH.device), count)
        return [prompts_BQH, real_BQ, weight, *texts]

    def parts(self, batch: Batch, step: int, inputs: Sequence[Tensor]) -> Iterator[Losses]:
        """The loss of a few images and their texts at a time."""
        prompts_BQH, real_BQ, weight, *texts = inputs
        device, (B, Q, _) = prompts_BQH.device, prompts_BQH.shape
        pieces = self.pieces or piece_count(B, B * Q + int(lengths(texts).sum()), cpu=device.type == "cpu")
        for images, own_texts in in_pieces(texts, B, pieces, self.model.language_model.compiled):
            rows = images.to(device)
            yield {"lm": self._loss(prompts_BQH[rows], real_BQ[rows], own_texts, weight)}

    def _loss(self, prompts_BQH: Tensor, real_BQ: Tensor, texts: Texts, weight: Tensor) -> Tensor:
        """Cross-entropy of texts given soft prompts, `weight` a predicted token: text n is about image n mod B."""
        real = real_BQ if real_BQ.shape[1] else None
        language, share = self.model.language_model, weight * int(texts[-1].sum())
        moved = [x.to(prompts_BQH.device) for x in texts]
        if not language.encoder_decoder:
            ids_NT, mask_NT, labels_NT = moved
            return language.decoder_loss(prompts_BQH, ids_NT, mask_NT, labels_NT, prompt_mask_BQ=real) * share
        enc_ids_NT = moved[0]
        repeats = len(enc_ids_NT) // len(prompts_BQH)
        real = None if real is None else real.repeat(repeats, 1)
        return language.encoder_decoder_loss(prompts_BQH.repeat(repeats, 1, 1), *moved, prompt_mask_BQ=real) * share

    def _soft_prompts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Soft prompts [N, Q, H], and which of them are real: bool [N, Q], or [N, 0] where all are.

        Samples with fewer images than others have padding in front of their soft prompts.
        """
        features_MPC = image_features(self.model, batch, self.token_drop)
        read = None if self.reader is None else self.reader(self._prompts(batch), batch.questions)
        texts = [x.to(features_MPC.device) for x in read or ()]
        groups, B = list(batch.groups(features_MPC)), len(batch)
        if len(groups) == 1:
            soft_NQH = self.model.soft_prompts(groups[0][1], *texts, marks=self._marks(groups[0][1]))
            return soft_NQH, torch.ones(len(soft_NQH), 0, dtype=torch.bool, device=soft_NQH.device)
        repeats = len(texts[0]) // B if texts else 1
        rows = [[B * n + row for n in range(repeats) for row in own] for own, _ in groups]
        parts = [
            self.model.soft_prompts(features, *(x[own] for x in texts), marks=self._marks(features))
            for own, (_, features) in zip(rows, groups, strict=True)
        ]
        longest = max(part.shape[1] for part in parts)
        order = torch.tensor([row for own in rows for row in own], device=features_MPC.device).argsort()
        padding = [longest - part.shape[1] for part in parts]
        soft_NQH = torch.cat([F.pad(part, (0, 0, pad, 0)) for part, pad in zip(parts, padding, strict=True)])
        real_NQ = torch.cat(
            [
                (torch.arange(longest, device=part.device) >= pad).expand(len(part), -1)
                for part, pad in zip(parts, padding, strict=True)
            ]
        )
        return soft_NQH[order], real_NQ[order]

    def _require_room(self, batch: Batch, length: int) -> None:
        room = self.model.language_model.room
        if batch.images is not None and room is not None and length > room:
            raise DataError(
                f"{batch.keys[batch.images.index(max(batch.images))]}: {max(batch.images)} images and their text are "
                f"{length} tokens, and the language model reads {room}: fewer images or --vision.frames"
            )

    def _marks(self, features: Tensor) -> list[Tensor]:
        """Ids of the text in front of each image of samples of several."""
        if features.ndim == 3 or self.config.image_mark is None:
            return []
        return self.tokenizer.marks(self.config.image_mark, features.shape[1])

    def _prompts(self, batch: Batch) -> list[str]:
        if batch.questions is None:
            return [self.config.prompt] * len(batch.captions)
        return [self.config.question.format(q) if q else self.config.prompt for q in batch.questions]

    def _split_captions(self, batch: Batch, step: int) -> Texts:
        prefixes, suffixes = self._prompts(batch), list(batch.captions)
        for n, caption in enumerate(batch.captions):
            if not batch.questions or not batch.questions[n]:
                prefix, suffixes[n] = split_caption(caption, batch.keys[n % len(batch)], self.seed, step)
                prefixes[n] = f"{self.config.prompt} {prefix}".strip()
        return self.tokenizer.pairs(prefixes, suffixes)


def piece_count(images: int, tokens: int, *, cpu: bool) -> int:
    """How many pieces of a batch the language model reads one after the other: up to `PIECES`, none of them small."""
    return max(1, min(PIECES, images, tokens // ENOUGH_TOKENS["cpu" if cpu else "accelerator"]))


def lengths(texts: Texts) -> Tensor:
    """Real tokens [N] of each text, on both sides of an encoder-decoder."""
    return torch.stack([mask.sum(1) for mask in (texts[1], *texts[3:])]).sum(0)


def in_pieces(texts: Texts, images: int, pieces: int, even: bool = False) -> list[tuple[Tensor, Texts]]:
    """Images [n] and their texts, in pieces of as many images, give or take one.

    Args:
        texts: ids and masks as the tokenizer makes them; text n is about image n mod `images`.
        even: leave texts padded as they are and images in their order, for compiled blocks. Else images with
            long texts are together and come first, and no piece is padded beyond its longest text.
    """
    lengths_N = lengths(texts)
    order = torch.arange(images) if even else torch.argsort(lengths_N.view(-1, images).amax(0), stable=True)
    split, out = order.tensor_split(pieces), []
    # the largest piece first: what it leaves behind has room for the others
    for chosen in split if even else reversed(split):
        rows = (torch.arange(0, len(lengths_N), images)[:, None] + chosen).flatten()
        own_texts = [x[rows] for x in texts]
        out.append((chosen, own_texts if even else _trimmed(own_texts)))
    return out


def _trimmed(texts: Texts) -> Texts:
    """Right-padded texts without the columns that all of them leave empty."""
    masks = (texts[1], texts[1], texts[1]) if len(texts) == 3 else (texts[1], texts[1], texts[3], texts[3])
    return [x[:, : int(mask.sum(1).max())] for x, mask in zip(texts, masks, strict=True)]


def split_caption(caption: str, key: str, seed: int, step: int) -> tuple[str, str]:
    """Split a caption at a random word into (prefix, suffix); the suffix is never empty."""
    words = caption.split()
    draw = np.random.default_rng([seed, step, *key.encode()]).integers(0, max(len(words), 1))
    return " ".join(words[:draw]), " ".join(words[draw:])
