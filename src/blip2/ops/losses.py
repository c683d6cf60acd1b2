"""The objectives as pure functions on already-gathered tensors (arXiv 2301.12597, section 3.2).

Nothing here knows of ranks, models or tokenizers. Shape letters: B rows of this process, G rows
of all processes, Q queries, M target positions, V vocabulary, D width in front of the output head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def itc_loss(
    image_to_text_BG: Tensor, text_to_image_BG: Tensor, targets_BG: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """Image-text contrastive loss: symmetric cross-entropy against soft targets.

    Args:
        image_to_text_BG, text_to_image_BG: similarities divided by the temperature.
        targets_BG: rows that sum to one (`blip2.ops.contrastive.itc_targets`).
        label_smoothing: share of the mass spread evenly over all columns.

    Returns:
        Scalar, the mean of both directions.
    """
    forward = F.cross_entropy(image_to_text_BG.float(), targets_BG, label_smoothing=label_smoothing)
    backward = F.cross_entropy(text_to_image_BG.float(), targets_BG, label_smoothing=label_smoothing)
    return (forward + backward) / 2


def itm_loss(logits_N2: Tensor, match_N: Tensor) -> Tensor:
    """Image-text matching loss: two-class cross-entropy, class 1 is a match.

    Args:
        logits_N2: one row per pair, already averaged over the queries.
        match_N: bool or int64, which pairs belong together.
    """
    return F.cross_entropy(logits_N2.float(), match_N.long())


def head_loss(
    x_MD: Tensor,
    head: Callable[[Tensor], Tensor],
    targets_M: Tensor,
    *,
    rows: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy [M] of what an output head makes of `x_MD`, in float32.

    Args:
        head: [rows, D] -> logits [rows, V].
        rows: logits held at a time; those of each chunk are computed again in the backward pass.
            None holds all of them.
    """

    def part(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), targets, label_smoothing=label_smoothing, reduction="none")

    if rows is None or len(targets_M) <= rows:
        return part(x_MD, targets_M)
    chunks = zip(x_MD.split(rows), targets_M.split(rows), strict=True)
    return torch.cat([checkpoint(part, x, targets, use_reentrant=False) for x, targets in chunks])


def next_token_positions(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions predict, and which are predicted, in right-padded text.

    Args:
        mask_BT: bool, True on real tokens.

    Returns:
        Two bool masks [B, T] with as many True each: position i of the first predicts the token
        at i + 1, marked in the second.
    """
    predicted = mask_BT.bool().clone()
    predicted[:, 0] = False
    predicting = torch.zeros_like(predicted)
    predicting[:, :-1] = predicted[:, 1:]
    return predicting, predicted
