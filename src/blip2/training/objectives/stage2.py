"""Stage 2: a module that maps a batch to the loss of the language model given the soft prompts.

It holds the model, so that wrapping it (DDP, FSDP2) wraps the whole step.
Shape letters: B images, N texts, T text tokens, Q queries, H language-model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from blip2.configs import LanguageConfig
from blip2.data.batch import Batch
from blip2.data.tokenizers import LanguageTokenizer, QFormerTokenizer
from blip2.models.language.model import LanguageModel
from blip2.models.stage2 import Stage2
from blip2.training.objectives.batches import Losses, image_features, mean_of_all
from blip2.training.objectives.split_backward import add_up, early_backward

# Ids and masks of texts [N, T] as the language model's tokenizer makes them; the last says what is predicted.
Texts = tuple[Tensor, ...]
# Some images of a batch and their texts.
Piece = tuple[Tensor, Texts]

# Pieces of a batch that the language model reads one after the other, and the fewest tokens of one: a processor
# core is busy with few, an accelerator would wait for its next kernel.
PIECES = 4
ENOUGH_TOKENS = {"cpu": 64, "accelerator": 1024}


class Stage2Objective(nn.Module):
    """Language modelling of the caption given the soft prompts (section 3.3).

    A batch of questions has their answers for captions and each question for prompt; a Q-Former that
    reads questions sees it too (section 4.3). `questions` makes the ids of its text. Where an image has
    several texts, its soft prompts are made once, and a decoder-only model reads them once.

    Decoder-only: prompt + caption, loss on the caption and its end token. Encoder-decoder: the
    caption is split at a random word into a prefix for the encoder and a suffix for the decoder;
    the split of a pair is a pure function of (seed, step, key). `token_drop`: see `VisionConfig`;
    `early`: see `TrainConfig.early_backward`.
    """

    def __init__(
        self,
        model: Stage2,
        tokenizer: LanguageTokenizer,
        config: LanguageConfig,
        seed: int = 0,
        questions: QFormerTokenizer | None = None,
        token_drop: float = 0.0,
        early: bool = False,
    ) -> None:
        super().__init__()
        self.token_drop, self.early = token_drop, early
        self.model, self.tokenizer, self.config, self.seed = model, tokenizer, config, seed
        self.questions = questions

    def forward(self, batch: Batch, step: int) -> Losses:
        """The loss `lm`."""
        prompts_BQH, language = self._soft_prompts(batch), self.model.language_model
        if language.encoder_decoder:
            texts = self._split_captions(batch, step)
        else:
            texts = self.tokenizer.targets(self._prompts(batch), batch.captions)
        count = int(texts[-1].sum())
        weight = mean_of_all(torch.tensor(1 / count, device=prompts_BQH.device), count)

        def parts(given: Sequence[Tensor], pieces: Iterable[Piece]) -> Iterator[Losses]:
            for images, rows in pieces:
                share, moved = weight * int(rows[-1].sum()), [x.to(given[0].device) for x in rows]
                yield {"lm": language_loss(language, given[0][images.to(given[0].device)], moved) * share}

        if not (self.early and torch.is_grad_enabled()):
            return add_up(parts([prompts_BQH], [(torch.arange(len(prompts_BQH)), texts)]))
        tokens = prompts_BQH.shape[0] * prompts_BQH.shape[1] + int(lengths(texts).sum())
        pieces = piece_count(len(prompts_BQH), tokens, cpu=prompts_BQH.device.type == "cpu")
        return early_backward(
            language,
            [prompts_BQH],
            lambda given: parts(given, in_pieces(texts, len(given[0]), pieces, language.compiled)),
        )

    def _soft_prompts(self, batch: Batch) -> Tensor:
        features_BPC = image_features(self.model, batch, self.token_drop)
        if batch.questions is None or self.questions is None:
            return self.model.soft_prompts(features_BPC)
        return self.model.soft_prompts(
            features_BPC, *(x.to(features_BPC.device) for x in self.questions(batch.questions))
        )

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


def language_loss(language: LanguageModel, prompts_BQH: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy of texts given soft prompts: text n is about image n mod B."""
    if not language.encoder_decoder:
        ids_NT, mask_NT, labels_NT = texts
        return language.decoder_loss(prompts_BQH, ids_NT, mask_NT, labels_NT)
    enc_ids_NT, enc_mask_NT, dec_ids_NT, dec_mask_NT = texts
    prompts_NQH = prompts_BQH.repeat(len(enc_ids_NT) // len(prompts_BQH), 1, 1)
    return language.encoder_decoder_loss(prompts_NQH, enc_ids_NT, enc_mask_NT, dec_ids_NT, dec_mask_NT)


def piece_count(images: int, tokens: int, *, cpu: bool) -> int:
    """How many pieces of a batch the language model reads one after the other: up to `PIECES`, none of them small."""
    return max(1, min(PIECES, images, tokens // ENOUGH_TOKENS["cpu" if cpu else "accelerator"]))


def lengths(texts: Texts) -> Tensor:
    """Real tokens [N] of each text, on both sides of an encoder-decoder."""
    return torch.stack([mask.sum(1) for mask in (texts[1], *texts[3:])]).sum(0)


def in_pieces(texts: Texts, images: int, pieces: int, even: bool = False) -> list[Piece]:
    """A batch in pieces of as many images, give or take one, each with all texts about its images.

    Args:
        texts: ids and masks as the tokenizer makes them; text n is about image n mod `images`.
        even: leave texts padded as they are and images in their order, for compiled blocks. Else images with
            long texts are together and come first, and no piece is padded beyond its longest text.
    """
    lengths_N = lengths(texts)
    order = torch.arange(images) if even else torch.argsort(lengths_N.view(-1, images).amax(0), stable=True)
    split, found = order.tensor_split(pieces), []
    # the largest piece first: what it leaves behind has room for the others
    for chosen in split if even else reversed(split):
        rows = (torch.arange(0, len(lengths_N), images)[:, None] + chosen).flatten()
        own = tuple(x[rows] for x in texts)
        found.append((chosen, own if even else _trimmed(own)))
    return found


def _trimmed(texts: Texts) -> Texts:
    """Right-padded texts without the columns that all of them leave empty."""
    masks = (texts[1], texts[1], texts[1]) if len(texts) == 3 else (texts[1], texts[1], texts[3], texts[3])
    return tuple(x[:, : int(mask.sum(1).max())] for x, mask in zip(texts, masks, strict=True))


def split_caption(caption: str, key: str, seed: int, step: int) -> tuple[str, str]:
    """Split a caption at a random word into (prefix, suffix); the suffix is never empty."""
    words = caption.split()
    draw = np.random.default_rng([seed, step, *key.encode()]).integers(0, max(len(words), 1))
    return " ".join(words[:draw]), " ".join(words[draw:])
