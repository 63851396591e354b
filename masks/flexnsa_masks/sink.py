"""Attention sink: each query sees the very first keys.

Definition: query q sees key k iff `k < n` and `k <= q`; being causal, it joins a causal pattern by `or_masks` and the
whole stays causal. Source: StreamingLLM (Xiao et al. 2023, arXiv 2309.17453), section 3.2:
`or_masks(sliding_window(w), sink(4))`.
"""

import torch
from torch import Tensor

from flexnsa_masks.geometry import Grid, MaskMod, Tiles, at_least, interval_tiles, with_tiles
from flexnsa_masks.intervals import with_interval


def sink(n: int) -> MaskMod:
    """Mask mod: keys `0 .. min(n - 1, q)`.

    Args:
        n: number of initial tokens, at least 0 (ValueError otherwise).

    >>> from torch.nn.attention.flex_attention import create_mask
    >>> create_mask(sink(2), 1, 1, 3, 3, device="cpu").int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 1, 0]]]]
    """
    at_least("sink", 0, n=n)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < n) & (kv_idx <= q_idx)

    def tiles(grid: Grid) -> Tiles:
        first, last = grid.queries()
        begin = torch.zeros_like(first)
        return interval_tiles(grid, (begin, begin), (first.clamp(max=n - 1), last.clamp(max=n - 1)))

    return with_interval(with_tiles(mask_mod, tiles, f"sink_{n}"), last=lambda b, q_idx: q_idx.clamp(max=n - 1))
