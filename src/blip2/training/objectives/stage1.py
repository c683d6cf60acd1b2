"""Stage 1: a module that maps a batch to the losses ITC, ITM and ITG; the trainer adds them up.

It holds the model, so that wrapping it (DDP, FSDP2) wraps the whole step.
Shape letters: B pairs of this process, G pairs of all processes, Q queries, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.configs import LossConfig
from blip2.data.batch import Batch
from blip2.data.tokenizers import QFormerTokenizer
from blip2.models.qformer.layers import KeyValue
from blip2.models.qformer.model import ImageKV
from blip2.models.stage1 import Stage1
from blip2.ops import contrastive, distributed, losses
from blip2.training.objectives.common import Losses, add_up, image_features


@dataclass(frozen=True)
class Captions:
    """Texts of a batch as the Q-Former reads them.

    Args:
        ids, mask: [N, T], right-padded.
        vectors: word vectors [N, 1 + T, D] of [DEC] and the ids.
    """

    ids: Tensor
    mask: Tensor
    vectors: Tensor

    @property
    def words(self) -> Tensor:
        """Word vectors [N, T, D] of the ids, [CLS] first."""
        return self.vectors[:, 1:]

    @property
    def causal(self) -> Tensor:
        """The same for ITG: [DEC] in place of [CLS]."""
        return torch.cat([self.vectors[:, :1], self.vectors[:, 2:]], dim=1)


class Stage1Objective(nn.Module):
    """ITC + ITM + ITG over pairs (arXiv 2301.12597, section 3.2).

    Args:
        seed: of the negatives; the draw of step N is a pure function of (seed, N), the same for
            any number of processes.
        accumulate: micro-batches per optimizer step; `forward` counts the former.
        token_drop: see `VisionConfig`.
    """

    def __init__(
        self,
        model: Stage1,
        tokenizer: QFormerTokenizer,
        config: LossConfig,
        seed: int = 0,
        accumulate: int = 1,
        token_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.config, self.seed = model, tokenizer, config, seed
        self.accumulate, self.token_drop = accumulate, token_drop

    def forward(self, batch: Batch, step: int) -> Losses:
        """Weighted losses `itc`, `itg`, `itm`; a weight of 0 leaves one out."""
        return add_up(self.parts(batch, step, self.inputs(batch, step)))

    def inputs(self, batch: Batch, step: int) -> list[Tensor]:
        """The texts (as `Captions` has them), image features [B, P, C], and their keys and values."""
        ids, mask = (x.to(self.model.temp.device) for x in self.tokenizer(batch.captions))
        features_BPC = image_features(self.model, batch, self.token_drop)
        image_kv = self.model.project_image(features_BPC)
        # looked up once for all passes, [DEC] in front of all
        vectors = self.model.qformer.embed_tokens(F.pad(ids, (1, 0), value=self.tokenizer.dec_id))
        return [ids, mask, vectors, features_BPC, *image_kv.tensors()]

    def parts(self, batch: Batch, step: int, inputs: Sequence[Tensor]) -> Iterator[Losses]:
        """ITC + ITG, then ITM in three passes."""
        ids, mask, vectors, features_BPC, *keys_and_values = inputs
        texts, image_kv, weights = Captions(ids, mask, vectors), ImageKV.of(keys_and_values), self.config
        images_BQE, cache = self.model.embed_images(image_kv)
        first, negatives = Losses(), None
        if weights.itc or weights.itm:
            first, negatives = self._itc(batch, step, images_BQE, texts)
        if weights.itg:
            first["itg"] = weights.itg * self._itg(texts, cache)
        del images_BQE, cache  # not held while ITM runs
        if first:
            yield first
        if weights.itm and negatives is not None:
            for itm in self._itm(texts, features_BPC, image_kv, *negatives):
                yield {"itm": weights.itm * itm}

    def _itc(
        self, batch: Batch, step: int, images_BQE: Tensor, texts: Captions
    ) -> tuple[Losses, tuple[Tensor, Tensor] | None]:
        """The weighted loss, and the hard negatives of ITM by the same similarities."""
        weights, image_ids_G = self.config, distributed.gather(batch.image_ids)
        i2t_BG, t2i_BG = self._similarities(images_BQE, self.model.embed_texts(texts.words, texts.mask))
        negatives = self._negatives(i2t_BG, t2i_BG, batch.image_ids, image_ids_G, step) if weights.itm else None
        if not weights.itc:
            return {}, negatives
        targets_BG = contrastive.itc_targets(batch.image_ids, image_ids_G)
        itc = losses.itc_loss(i2t_BG, t2i_BG, targets_BG, label_smoothing=weights.itc_smoothing)
        return {"itc": weights.itc * itc}, negatives

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
        start = distributed.rank() * len(ids_B)
        mine = uniform_2G[:, start : start + len(ids_B)].to(ids_B.device)
        ramp = self.config.itm_ramp * self.accumulate
        hardness = self.config.itm_hardness * (min(1.0, step / ramp) if ramp else 1.0)
        texts = contrastive.sample_hard_negatives(hardness * i2t_BG.detach(), ids_B, ids_G, mine[0])
        images = contrastive.sample_hard_negatives(hardness * t2i_BG.detach(), ids_B, ids_G, mine[1])
        return texts, images

    def _itm(
        self, texts: Captions, features: Tensor, image_kv: ImageKV, texts_B: Tensor, images_B: Tensor
    ) -> Iterator[Tensor]:
        """One positive and two hard negatives per pair, in three passes; their mean is the sum of what is yielded.

        The images with their own texts, with negative texts, and the texts with negative images. Only
        the chosen images travel between processes.
        """
        words, mask = texts.words, texts.mask
        B, alone = len(mask), int(texts_B.min()) < 0
        scale = distributed.mean_of_all(torch.tensor(1.0, device=mask.device), B if alone else 3 * B) / (
            1 if alone else 3
        )
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
            negative_kv = image_kv.select(images_B)
        else:
            negative_kv = self.model.project_image(distributed.fetch_rows(features, images_B))
        yield scale * losses.itm_loss(self.model.match_logits(words, mask, negative_kv), ~match)

    def _itg(self, texts: Captions, cache: list[KeyValue]) -> Tensor:
        """Next-token loss of the text on the query cache; [CLS] is replaced by [DEC]."""
        predicting, predicted = losses.next_token_positions(texts.mask)
        qformer, targets, smoothing = self.model.qformer, texts.ids[predicted], self.config.itg_smoothing
        states = qformer.decode_states(texts.causal, texts.mask, cache, predicting)
        losses_M = losses.head_loss(
            states, qformer.predict, targets, rows=qformer.head_chunk, label_smoothing=smoothing
        )
        return distributed.mean_of_all(losses_M.mean(), len(targets))
