"""Causal: no query sees the future.

Definition: query q sees key k iff `k <= q`. Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.3.
"""

import torch
from torch import Tensor

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, interval_tiles, with_tiles
from flexnsa_masks.intervals import with_interval


def causal() -> MaskMod:
    """Mask mod: keys `0 .. q`.

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(causal(), 1, 1, 3, 3, device="cpu").int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    """

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx

    def tiles(grid: Grid) -> Tiles:
        query = grid.queries()
        begin = torch.zeros_like(query[0])
        return interval_tiles(grid, (begin, begin), query)

    return with_interval(with_tiles(mask_mod, tiles, "causal"), last=lambda b, q_idx: q_idx)
