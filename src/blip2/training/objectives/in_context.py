"""Stage 2 on sequences of several image-text pairs, for learning from examples in the context.

Shape letters: B pairs, N texts (a multiple of B), Q queries, H language-model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.configs import LanguageConfig
from blip2.data.batch import Batch
from blip2.data.tokenizers import InstructionReader, LanguageTokenizer
from blip2.errors import ConfigError
from blip2.models.language.interleave import interleave, interleaved_loss
from blip2.models.stage2 import Stage2
from blip2.ops import distributed
from blip2.training.objectives.common import Losses
from blip2.training.objectives.stage2 import Stage2Objective, split_caption


class InContextObjective(Stage2Objective):
    """Language modelling of the texts of `shots` + 1 pairs in one sequence: image, text, image, text, ...

    The sequences consist of the batch's own pairs in order, so no image is encoded twice. Decoder-only:
    loss on every text and its end token, as in Flamingo (arXiv 2204.14198, section 2.4) and OpenFlamingo
    (arXiv 2308.01390): pair n of a sequence is learned with n - 1 examples before it. Encoder-decoder: the
    encoder reads the sequence up to the last text's split, and only the rest of that text is learned.

    In evaluation each pair stands alone, as in `Stage2Objective`, so that the dev losses of runs compare.

    Raises:
        ConfigError: in `forward`, a process's micro-batch is not a whole number of sequences.
    """

    def __init__(
        self,
        model: Stage2,
        tokenizer: LanguageTokenizer,
        config: LanguageConfig,
        seed: int = 0,
        reader: InstructionReader | None = None,
        token_drop: float = 0.0,
        *,
        shots: int,
    ) -> None:
        super().__init__(model, tokenizer, config, seed, reader, token_drop)
        self.length = shots + 1

    def forward(self, batch: Batch, step: int) -> Losses:
        """The loss `lm`."""
        if not self.training:
            return super().forward(batch, step)
        if len(batch) % self.length:
            raise ConfigError(
                f"data.shots is {self.length - 1}: a process has micro-batches of {len(batch)} pairs, which are no "
                f"whole number of sequences of {self.length}: change train.batch or train.accumulate"
            )
        soft_BQH, real_BQ = self._soft_prompts(batch)
        if real_BQ.shape[1]:
            raise ConfigError("data.shots: samples of several images cannot be examples: set it to 0")
        soft_NQH = soft_BQH.repeat(len(batch.captions) // len(soft_BQH), 1, 1)
        if self.model.language_model.encoder_decoder:
            return {"lm": self._last_of_each(soft_NQH, batch, step)}
        parts = self.tokenizer.targets(self._prompts(batch), batch.captions)
        ids, mask, labels = (x.to(soft_NQH.device) for x in parts)
        front = self.tokenizer.front
        language_model = self.model.language_model
        sequences = interleave(language_model, soft_NQH, ids, mask, labels, self.length, front=front)
        loss = interleaved_loss(language_model, sequences)
        return {"lm": distributed.mean_of_all(loss, int(sequences.labels.sum()))}

    def _last_of_each(self, soft_NQH: Tensor, batch: Batch, step: int) -> Tensor:
        """Loss of the last text of each sequence, by an encoder-decoder."""
        prompts, last = self._prompts(batch), self.length - 1
        prefixes, suffixes = [], []
        keys = batch.keys * (len(batch.captions) // len(batch))
        for n, (prompt, text, key) in enumerate(zip(prompts, batch.captions, keys, strict=True)):
            if n % self.length < last:
                prefixes.append(f"{prompt} {text}".strip())
                continue
            head, tail = (
                ("", text) if batch.questions and batch.questions[n] else split_caption(text, key, self.seed, step)
            )
            prefixes.append(f"{prompt} {head}".strip())
            suffixes.append(tail)
        read = self.tokenizer.pairs(prefixes, [])[:2]
        written = self.tokenizer.pairs([], suffixes)[2:]
        ids, mask, dec_ids, dec_mask = (x.to(soft_NQH.device) for x in (*read, *written))
        language_model = self.model.language_model
        sequences = interleave(language_model, soft_NQH, ids, mask, torch.zeros_like(mask), self.length)
        loss = language_model.encoded_loss(sequences.embeds, sequences.mask, dec_ids, dec_mask)
        return distributed.mean_of_all(loss, int(dec_mask.sum()))
