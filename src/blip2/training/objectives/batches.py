"""What both stages make of a batch: image features, and means over the pairs of all processes.

Shape letters: B pairs of this process, P patches, C image-encoder channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2.data.batch import Batch
from blip2.models.stage1 import Stage1
from blip2.models.stage2 import Stage2
from blip2.ops import distributed

Losses = dict[str, Tensor]


def image_features(model: Stage1 | Stage2, batch: Batch, drop: float = 0.0) -> Tensor:
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


def mean_of_all(loss: Tensor, count: int) -> Tensor:
    """Scale a mean over `count` local terms so that averaging over processes is the global mean."""
    if distributed.world_size() == 1:
        return loss
    counts = distributed.mean_over_processes(torch.tensor(float(count), device=loss.device))
    return loss * (count / counts)
