"""Self-attention masks over [query tokens, text tokens] (arXiv 2301.12597, figure 2).

The unimodal one of ITC has no function: queries and text run apart, which is the same. The others
take the number of queries and the text's padding mask and return a boolean tensor [B, 1, Q+T, Q+T]
where True means "row may attend to column", as `torch.nn.functional.scaled_dot_product_attention`
reads it. Padding is never seen; a padded row sees what a real one in its place would, so no row is empty.

    unimodal (ITC)              bidirectional (ITM)         multimodal causal (ITG)
          q q | t t t                 q q | t t t                 q q | t t t
      q   x x |                   q   x x | x x x             q   x x |
      q   x x |                   q   x x | x x x             q   x x |
      t       | x x x             t   x x | x x x             t   x x | x
      t       | x x x             t   x x | x x x             t   x x | x x
      t       | x x x             t   x x | x x x             t   x x | x x x

Shape letters: B batch, Q queries, T text tokens.
"""

import torch
from torch import Tensor


def bidirectional_mask(queries: int, text_mask_BT: Tensor) -> Tensor:
    """ITM: all see all."""
    batch, length = text_mask_BT.shape
    visible = torch.cat([text_mask_BT.new_ones(batch, queries, dtype=torch.bool), text_mask_BT.bool()], dim=1)
    return visible[:, None, None, :].expand(batch, 1, queries + length, queries + length)


def multimodal_causal_mask(queries: int, text_mask_BT: Tensor) -> Tensor:
    """ITG: queries see queries; text token i sees all queries and text tokens up to i."""
    batch, length = text_mask_BT.shape
    mask = text_mask_BT.new_zeros(batch, 1, queries + length, queries + length, dtype=torch.bool)
    mask[..., :queries] = True
    causal = torch.ones(length, length, dtype=torch.bool, device=text_mask_BT.device).tril()
    mask[..., queries:, queries:] = causal & text_mask_BT.bool()[:, None, None, :]
    return mask
