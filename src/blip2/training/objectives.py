"""Objectives: modules that map a batch to a dict of named losses; the trainer adds them up.

An objective holds the model, so that wrapping it (DDP, FSDP2) wraps the whole step.
Shape letters: B pairs of this process, G pairs of all processes, Q queries, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.configs import LanguageConfig, LossConfig
from blip2.data.batch import Batch
from blip2.data.text import LanguageTokenizer, QFormerTokenizer
from blip2.models.language_model import LanguageModel
from blip2.models.qformer import ImageKV
from blip2.models.qformer_layers import KeyValue
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.ops import contrastive, distributed, losses
from blip2.training.early import add_up, early_backward

Losses = dict[str, Tensor]
# Ids and masks of texts [N, T] as the language model's tokenizer makes them; the last says what is predicted.
Texts = tuple[Tensor, ...]
# Some images of a batch and their texts.
Piece = tuple[Tensor, Texts]

# Pieces of a batch that the language model reads one after the other, and the fewest tokens of one: a processor
# core is busy with few, an accelerator would wait for its next kernel.
PIECES = 4
ENOUGH_TOKENS = {"cpu": 64, "accelerator": 1024}


class Objective(Protocol):
    """What the trainer asks of an objective; `nn.Module`s below implement it."""

    def __call__(self, batch: Batch, step: int) -> Losses: ...


def _features(model: Stage1 | Stage2, batch: Batch, drop: float = 0.0) -> Tensor:
    """Image features of a batch; while the model trains, a share `drop` of each image's patches is left out."""
    if batch.features is not None:
        features_BPC = batch.features
    elif batch.pixels is not None:
        features_BPC = model.features(batch.pixels)
    else:
        raise ValueError("a batch needs pixels or features")
    if not drop or not model.training:
        return features_BPC
    return drop_tokens(features_BPC, drop, int(getattr(model.vision, "prefix", 0)))


def drop_tokens(features_BPC: Tensor, drop: float, prefix: int) -> Tensor:
    """Every image with another random share 1 - `drop` of its patches.

    Args:
        prefix: tokens in front of the patches ([CLS], registers), always kept.
    """
    B, P, C = features_BPC.shape
    keep = max(1, round((P - prefix) * (1 - drop)))
    chosen_BK = torch.rand(B, P - prefix, device=features_BPC.device).argsort(dim=1)[:, :keep] + prefix
    first_BR = torch.arange(prefix, device=features_BPC.device).expand(B, -1)
    index_BK = torch.cat([first_BR, chosen_BK], dim=1)
    return features_BPC.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, C))


def _mean_of_all(loss: Tensor, count: int) -> Tensor:
    """Scale a mean over `count` local terms so that averaging over processes is the global mean."""
    if distributed.world_size() == 1:
        return loss
    counts = distributed.mean_over_processes(torch.tensor(float(count), device=loss.device))
    return loss * (count / counts)


@dataclass(frozen=True)
class CaptionIds:
    """Texts of a batch as the Q-Former reads them.

    Args:
        ids, mask: [N, T], right-padded.
        looked_up: word vectors [N, 1 + T, D] of [DEC] and the ids.
    """

    ids: Tensor
    mask: Tensor
    looked_up: Tensor

    @property
    def words(self) -> Tensor:
        """Word vectors [N, T, D] of the ids, [CLS] first."""
        return self.looked_up[:, 1:]

    @property
    def causal(self) -> Tensor:
        """The same for ITG: [DEC] in place of [CLS]."""
        return torch.cat([self.looked_up[:, :1], self.looked_up[:, 2:]], dim=1)


class Stage1Objective(nn.Module):
    """ITC + ITM + ITG over pairs (arXiv 2301.12597, section 3.2).

    Args:
        seed: of the negatives; the draw of step N is a pure function of (seed, N), the same for
            any number of processes.
        accumulate: micro-batches per optimizer step; `forward` counts the former.
        token_drop: see `VisionConfig`.
        early: see `TrainConfig.early_backward`; the losses are then a sum to run backward on, and one of
            them alone brings the gradients of all.
    """

    def __init__(
        self,
        model: Stage1,
        tokenizer: QFormerTokenizer,
        config: LossConfig,
        seed: int = 0,
        accumulate: int = 1,
        token_drop: float = 0.0,
        early: bool = False,
    ) -> None:
        super().__init__()
        self.token_drop, self.early = token_drop, early
        self.model, self.tokenizer, self.config, self.seed = model, tokenizer, config, seed
        self.accumulate = accumulate

    def forward(self, batch: Batch, step: int) -> Losses:
        """Weighted losses `itc`, `itg`, `itm`; a weight of 0 leaves one out."""
        ids, mask = (x.to(self.model.temp.device) for x in self.tokenizer(batch.captions))
        features = _features(self.model, batch, self.token_drop)
        image_kv = self.model.project_image(features)
        # looked up once for all passes, [DEC] in front of all
        words = self.model.qformer.look_up(F.pad(ids, (1, 0), value=self.tokenizer.dec_id))
        inputs = [features, words, *image_kv.tensors()]

        def parts(given: Sequence[Tensor]) -> Iterator[Losses]:
            texts = CaptionIds(ids, mask, given[1])
            return self._parts(batch, step, texts, given[0], ImageKV.of(given[2:]))

        early = self.early and torch.is_grad_enabled()
        return early_backward(self.model, inputs, parts) if early else add_up(parts(inputs))

    def _parts(
        self, batch: Batch, step: int, texts: CaptionIds, features: Tensor, image_kv: ImageKV
    ) -> Iterator[Losses]:
        """The losses in parts that share nothing but word vectors, `features`, `image_kv` and parameters."""
        config, out, negatives = self.config, Losses(), None
        images_BQE, cache = self.model.embed_images(image_kv)
        if config.itc or config.itm:
            image_ids_G = distributed.gather(batch.image_ids)
            i2t_BG, t2i_BG = self._similarities(images_BQE, self.model.embed_texts(texts.words, texts.mask))
            if config.itm:
                negatives = self._negatives(i2t_BG, t2i_BG, batch.image_ids, image_ids_G, step)
            if config.itc:
                targets = contrastive.itc_targets(batch.image_ids, image_ids_G)
                itc = losses.itc_loss(i2t_BG, t2i_BG, targets, label_smoothing=config.itc_smoothing)
                out["itc"] = config.itc * itc
            del i2t_BG, t2i_BG
        if config.itg:
            out["itg"] = config.itg * self._itg(texts, cache)
        del images_BQE, cache
        if out:
            yield out
        if negatives is not None:
            for part in self._itm(texts, features, image_kv, *negatives):
                yield {"itm": config.itm * part}

    def _similarities(self, images_BQE: Tensor, texts_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Image-to-text and text-to-image similarities [B, G] over the temperature."""
        if self.config.itc_one_sided:
            all_images, all_texts = distributed.gather(images_BQE), distributed.gather(texts_BE)
        else:
            all_images, all_texts = distributed.gather_with_grad(images_BQE), distributed.gather_with_grad(texts_BE)
        i2t = contrastive.query_text_similarity(images_BQE, all_texts)
        t2i = contrastive.text_query_similarity(texts_BE, all_images)
        return i2t / self.model.temp, t2i / self.model.temp

    def _negatives(
        self, i2t_BG: Tensor, t2i_BG: Tensor, ids_B: Tensor, ids_G: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Global indices of one hard negative text per image, and one image per text."""
        uniform_2G = torch.from_numpy(np.random.default_rng([self.seed, step]).random((2, len(ids_G))))
        start = distributed.row_offset(len(ids_B))
        mine = uniform_2G[:, start : start + len(ids_B)].to(ids_B.device)
        ramp = self.config.itm_ramp * self.accumulate
        hardness = self.config.itm_hardness * (min(1.0, step / ramp) if ramp else 1.0)
        texts = contrastive.sample_hard_negatives(hardness * i2t_BG.detach(), ids_B, ids_G, mine[0])
        images = contrastive.sample_hard_negatives(hardness * t2i_BG.detach(), ids_B, ids_G, mine[1])
        return texts, images

    def _itm(
        self, texts: CaptionIds, features: Tensor, image_kv: ImageKV, texts_B: Tensor, images_B: Tensor
    ) -> Iterator[Tensor]:
        """One positive and two hard negatives per pair, in three passes; their mean is the sum of what is yielded.

        The images with their own texts, with negative texts, and the texts with negative images. Only
        the chosen images travel between processes.
        """
        words, mask = texts.words, texts.mask
        B, alone = len(mask), int(texts_B.min()) < 0
        scale = _mean_of_all(torch.tensor(1.0, device=mask.device), B if alone else 3 * B) / (1 if alone else 3)
        match = torch.ones(B, dtype=torch.bool, device=mask.device)
        yield scale * losses.itm_loss(self.model.match_logits(words, mask, image_kv), match)
        if alone:
            return
        if distributed.world_size() == 1:
            negatives = words[texts_B], mask[texts_B]
        else:
            all_ids, all_masks = distributed.gather_texts(texts.ids, mask, self.tokenizer.pad_id)
            negatives = all_ids[texts_B], all_masks[texts_B]
        yield scale * losses.itm_loss(self.model.match_logits(*negatives, image_kv), ~match)
        if distributed.world_size() == 1:
            negative_kv = image_kv.take(images_B)
        else:
            negative_kv = self.model.project_image(distributed.fetch_rows(features, images_B))
        yield scale * losses.itm_loss(self.model.match_logits(words, mask, negative_kv), ~match)

    def _itg(self, texts: CaptionIds, cache: list[KeyValue]) -> Tensor:
        """Next-token loss of the text on the query cache; [CLS] is replaced by [DEC]."""
        at, predicted = losses.next_token_positions(texts.mask)
        qformer, targets = self.model.qformer, texts.ids[predicted]
        states = qformer.decode_states(texts.causal, texts.mask, cache, at)
        each = losses.head_loss(
            states, qformer.predict, targets, rows=qformer.head_chunk, label_smoothing=self.config.itg_smoothing
        )
        loss = each.mean()
        return _mean_of_all(loss, len(targets))


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
        weight = _mean_of_all(torch.tensor(1 / count, device=prompts_BQH.device), count)

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
        features_BPC = _features(self.model, batch, self.token_drop)
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
